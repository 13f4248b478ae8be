"""The format of an adapter, recognised from its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stages.adapters import find
from tests.support.peft_files import lora_pair, write_peft

Q = "model.layers.0.self_attn.q_proj"


def test_a_folder_of_two_adapters_is_refused(tmp_path: Path) -> None:
    write_peft(tmp_path, lora_pair(Q))
    np.savez(tmp_path / "adapters.npz")
    with pytest.raises(ValueError, match=r"holds several adapters \(adapter_model.safetensors, adapters.npz\)"):
        find.kind_of(tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ValueError, match=r"a.gguf: no adapter; name an adapter's folder, or an .npz file"):
        find.read(tmp_path / "a.gguf")


def test_no_adapter_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_config.json: no such file; make it with: python -m stages.train"):
        find.read(tmp_path / "nothing")


def test_a_digest_changes_with_any_file_that_is_read(tmp_path: Path) -> None:
    write_peft(tmp_path, lora_pair(Q))
    first = find.digest(tmp_path)
    write_peft(tmp_path, lora_pair(Q), lora_alpha=9)
    second = find.digest(tmp_path)
    write_peft(tmp_path, lora_pair(Q, seed=1), lora_alpha=9)
    (tmp_path / "README.md").touch()
    assert len({first, second, find.digest(tmp_path)}) == 3
    np.savez(tmp_path / "a.npz", x=np.ones(2))
    one = find.digest(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", x=np.zeros(2))
    assert find.digest(tmp_path / "a.npz") != one
