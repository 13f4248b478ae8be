"""An adapter's folder → an adapter in GGUF, read back; what llama.cpp has no form for is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from stages.formats.gguf_adapter import export_adapter
from stages.lora import adapter, adapter_files
from stages.model.load import load_base
from stages.sources.gguf_architectures import unpermute
from tests.support.adapters import configure, fill
from tests.support.gguf_models import write_exportable

HEADS = {"attn_q": 4, "attn_k": 2}


def trained(folder: Path, out: Path, *, targets: tuple[str, ...] = ("all-linear",), kind: str = "lora") -> Path:
    model = load_base(folder)[0]
    config = configure(model, type=kind, targets=list(targets))
    adapter.attach(model, config, seed=0)
    fill(model)
    adapter.save(out, model, config)
    return out


@pytest.mark.parametrize("quantize", [False, True])
def test_file_holds_what_the_adapter_adds(tmp_path: Path, quantize: bool) -> None:
    folder = write_exportable(tmp_path / "base", "llama", quantize=quantize)
    saved = trained(folder, tmp_path / "adapter")
    summary = export_adapter(saved, folder, tmp_path / "adapter.gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    arrays = {
        name: np.array(array) for name, array in adapter_files.read_weights(saved / adapter_files.WEIGHTS_FILE).items()
    }
    assert summary.tensors == len(found) == len(arrays)
    for part, hf in {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "ffn_down": "mlp.down_proj"}.items():
        a, b = found[f"blk.1.{part}.weight.lora_a"], found[f"blk.1.{part}.weight.lora_b"]
        update = b @ a
        update = unpermute(update, heads=HEADS[part]) if part in HEADS else update
        name = f"model.layers.1.{hf}"
        np.testing.assert_allclose(
            update, (arrays[f"{name}.lora_a"] @ arrays[f"{name}.lora_b"]).T, rtol=1e-5, atol=1e-5
        )


def test_metadata_says_scale_by_alpha(tmp_path: Path) -> None:
    folder = write_exportable(tmp_path / "base", "qwen2")
    export_adapter(trained(folder, tmp_path / "adapter"), folder, tmp_path / "adapter.gguf")
    fields = gguf.GGUFReader(tmp_path / "adapter.gguf").fields
    found = {key: fields[key].contents() for key in ("general.type", "general.architecture", "adapter.type")}
    assert found == {"general.type": "adapter", "general.architecture": "qwen2", "adapter.type": "lora"}
    config = adapter_files.read_config(tmp_path / "adapter")
    assert fields["adapter.lora.alpha"].contents() == config.scale * config.rank == 8


def refused(folder: Path, saved: Path, out: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        export_adapter(saved, folder, out)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_dora_is_refused(tmp_path: Path) -> None:
    folder = write_exportable(tmp_path / "base", "llama")
    saved = trained(folder, tmp_path / "adapter", kind="dora")
    refused(folder, saved, tmp_path / "a.gguf", "llama.cpp has no form for dora; merge it")


def test_adapted_embedding_is_refused(tmp_path: Path) -> None:
    folder = write_exportable(tmp_path / "base", "llama")
    saved = trained(folder, tmp_path / "adapter", targets=("q_proj", "embed_tokens"))
    refused(folder, saved, tmp_path / "a.gguf", "adapter on the embedding has no proven form")


def test_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    saved = trained(write_exportable(tmp_path / "base", "llama"), tmp_path / "adapter")
    other = write_exportable(tmp_path / "other", "llama", intermediate_size=64)
    refused(other, saved, tmp_path / "a.gguf", r"is for a matrix of 64 × 96, that of .* is 64 × 64")
    fused = write_exportable(tmp_path / "fused", "phi3")
    refused(fused, saved, tmp_path / "a.gguf", r"adapts model\.layers\.0\.mlp\.gate_proj, which .* lacks")


def test_folder_that_holds_no_adapter_is_refused(tmp_path: Path) -> None:
    folder = write_exportable(tmp_path / "base", "llama")
    refused(folder, tmp_path, tmp_path / "a.gguf", r"adapter_config\.json: no such file")
