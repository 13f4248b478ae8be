"""The cache of frozen layers under the stages: parameters that keep it, changes that make another, its size."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stages.baseline import baseline
from stages.evaluate import evaluate
from stages.fetch import fetch
from stages.files.hashes import sha256
from stages.lora import code, frozen_cache
from stages.lora.frozen import FrozenLayers
from stages.lora.selfcheck import Check
from stages.merge import merge
from stages.prepare import prepare
from stages.tokenize import tokenize
from stages.train import train
from tests.support.tiny import small_params, write_llama

ADAPTER = Path("artifacts/adapter/adapters.safetensors")


@pytest.fixture
def tokens(project: Path) -> Path:
    fetch()
    prepare()
    tokenize()
    return project


def caches() -> dict[str, int]:
    """Each cache's name and bytes."""
    return {folder.name: (folder / "states.bin").stat().st_size for folder in Path("artifacts/cache").iterdir()}


def computed(monkeypatch: pytest.MonkeyPatch, *overrides: str, stage: Any = train) -> int:
    """The number of rows whose states a stage computes."""
    count = []
    plain = FrozenLayers._computed

    def counted(self: FrozenLayers, ids_L: np.ndarray) -> Any:
        if self.layers:
            count.append(1)
        return plain(self, ids_L)

    with monkeypatch.context() as patch:
        patch.setattr(FrozenLayers, "_computed", counted)
        stage(overrides=["train.epochs=2", "train.iters=null", *overrides])
    return len(count)


def test_each_row_is_computed_once_and_never_again(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = json.loads(Path("artifacts/details/tokenize.json").read_text(encoding="utf-8"))
    rows = used["train"]["rows_used"] + used["valid"]["rows_used"]
    assert computed(monkeypatch) == rows
    first = caches()
    for kept in (
        "train.learning_rate=1e-3", "seed=1", "lora.rank=2", "lora.dropout=0.1", "lora.targets=[o_proj]",
        "lora.type=dora", "train.epochs=3", "train.schedule=cosine", "train.batch_size=3", "train.optimizer=sgd",
    ):  # fmt: skip
        assert computed(monkeypatch, kept) == 0, kept
    assert caches() == first
    # Test rows and general text by the base, once for all experiments; the merged model's frozen layers are others.
    assert computed(monkeypatch, stage=baseline) == used["test"]["rows_used"] + 2
    assert computed(monkeypatch, stage=merge) == 0
    assert computed(monkeypatch, stage=evaluate) == used["test"]["rows_used"]
    assert computed(monkeypatch, stage=evaluate) == 0


def test_another_mask_keeps_it_and_other_tokens_add_to_it(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed(monkeypatch)
    tokenize(overrides=["tokenize.train_on=all"])
    assert computed(monkeypatch) == 0
    with Path("data/raw/rows.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(f'{{"question": "{i}의 두 배는?", "answer": "{2 * i}이다."}}\n' for i in range(100, 103))
    prepare()
    tokenize()
    assert computed(monkeypatch) <= 3
    assert len(caches()) == 1


def test_whatever_shapes_the_states_makes_another_cache(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed(monkeypatch)
    assert len(caches()) == 1
    everything = computed(monkeypatch, "lora.layers=1")
    assert everything > 0 and len(caches()) == 2
    assert computed(monkeypatch, "model.dtype=bfloat16") == everything
    assert computed(monkeypatch, "model.cpu_kernels=false") == everything
    with monkeypatch.context() as patch:
        patch.setattr(code, "installed_version", lambda name: "another")
        assert computed(patch) == everything
    for changed in ("frozen.py", "patches.py", "load.py"):
        with monkeypatch.context() as patch:
            patch.setattr(code, "sha256", lambda path, name=changed: name if path.name == name else sha256(path))
            assert computed(patch) == everything
    other = write_llama(tmp_path / "other", seed=5)
    Path("params.yaml").write_text(small_params(source=str(other)), encoding="utf-8")
    fetch()
    tokenize()
    assert computed(monkeypatch) == everything
    assert len(caches()) == 9


def test_what_is_skipped_takes_no_memory(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx.core as mx

    wide = write_llama(tmp_path / "wide", intermediate_size=60_000, num_hidden_layers=4)
    Path("params.yaml").write_text(small_params(source=str(wide)), encoding="utf-8")
    fetch()
    tokenize()
    taken = []
    monkeypatch.setattr("stages.training.loop.Trainer.finish", lambda trainer: taken.append(mx.get_active_memory()))
    for _ in ("computed", "read"):
        train(overrides=["train.iters=1", "train.batch_size=1", "train.val_batches=1"])
    two_layers = 2 * 3 * 32 * 60_000 * 4
    assert taken[0] - taken[1] > 0.9 * two_layers


def test_with_and_without_it_the_loss_is_the_same(tokens: Path) -> None:
    losses = {}
    for mode in ("off", "on", "auto"):
        train(overrides=[f"model.cache_frozen={mode}"])
        losses[mode] = json.loads(Path("artifacts/metrics/train.json").read_text(encoding="utf-8"))["valid_loss"]
        assert Path("artifacts/cache").exists() == (mode != "off")
    assert losses["on"] == losses["auto"] == pytest.approx(losses["off"], abs=1e-4)


def test_the_disk_shapes_no_result(
    tokens: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train()
    kept = ADAPTER.read_bytes()
    shutil.rmtree("artifacts/cache")
    capsys.readouterr()
    train(overrides=["runtime.cache_gb=0"])
    assert "is more than runtime.cache_gb" in capsys.readouterr().out
    assert ADAPTER.read_bytes() == kept and sum(caches().values()) == 0
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        train()
    assert "half of the free disk" in capsys.readouterr().out
    assert ADAPTER.read_bytes() == kept and sum(caches().values()) == 0
    train(overrides=["runtime.cache_gb=0", "model.cache_frozen=on"])
    assert ADAPTER.read_bytes() == kept and sum(caches().values()) > 0


def test_over_the_limit_the_oldest_goes(tokens: Path) -> None:
    train()
    (first,) = caches()
    train(overrides=["lora.layers=1"])
    assert len(caches()) == 2
    os.utime(f"artifacts/cache/{first}", (1, 1))
    size = sum(path.stat().st_size for path in Path("artifacts/cache").glob("*/*"))
    train(overrides=["lora.layers=1", f"runtime.cache_gb={(size - 1) / 1e9}"])
    assert first not in caches() and len(caches()) == 1


def test_what_earlier_rows_left_makes_room(tokens: Path) -> None:
    train()
    (size,) = caches().values()
    with Path("params.yaml").open(encoding="utf-8") as file:
        text = file.read()
    Path("params.yaml").write_text(text.replace("### 질문", "### 물음"), encoding="utf-8")
    prepare()
    tokenize()
    train(overrides=[f"runtime.cache_gb={1.2 * size / 1e9}"])
    assert 0 < next(iter(caches().values())) <= 1.2 * size


def test_damage_is_told_and_repaired(tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train()
    before = ADAPTER.read_bytes()
    (file,) = Path("artifacts/cache").glob("*/states.bin")
    content = file.read_bytes()
    file.write_bytes(bytes(len(content)))
    capsys.readouterr()
    train()
    assert "was damaged" in capsys.readouterr().err
    assert ADAPTER.read_bytes() == before
    train()
    assert "was damaged" not in capsys.readouterr().err


def test_states_of_another_model_make_way(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a folder had been copied under another's name."""
    train()
    before = ADAPTER.read_bytes()
    (name,) = caches()
    shutil.rmtree(f"artifacts/cache/{name}")
    with monkeypatch.context() as patch:
        plain = FrozenLayers._computed
        patch.setattr(FrozenLayers, "_computed", lambda self, ids_L: 1.5 * plain(self, ids_L))
        patch.setattr(frozen_cache, "check_frozen", lambda frozen, rows: Check("model.cache_frozen"))
        train()
    assert ADAPTER.read_bytes() != before
    Path(f"artifacts/cache/{name}/verified").unlink()
    train()
    assert ADAPTER.read_bytes() == before


def test_a_model_that_cannot_be_cut_is_trained_whole(
    tokens: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(overrides=["model.cache_frozen=off"])
    loss = json.loads(Path("artifacts/metrics/train.json").read_text(encoding="utf-8"))["valid_loss"]
    plain = FrozenLayers._computed
    monkeypatch.setattr(FrozenLayers, "_computed", lambda self, ids_L: 1.5 * plain(self, ids_L))
    train()
    assert re.search(r"model\.cache_frozen is not used: \d.*% off in the logits", capsys.readouterr().out)
    assert json.loads(Path("artifacts/metrics/train.json").read_text(encoding="utf-8"))["valid_loss"] == loss


def test_experiments_share_the_projects_own_cache(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "root"))
    train()
    assert list((tmp_path / "root" / "artifacts" / "cache").glob("*/states.bin"))
    assert not Path("artifacts/cache").exists()


def test_adapting_the_first_layer_leaves_nothing_to_skip(tokens: Path) -> None:
    train(overrides=["lora.layers=all"])
    assert not Path("artifacts/cache").exists()


def test_a_read_only_folder_is_told(tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("artifacts/cache").write_text("in the way", encoding="utf-8")
    train()
    assert "is computed each time (" in capsys.readouterr().out.replace("\n", " ")
