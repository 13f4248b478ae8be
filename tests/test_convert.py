"""The command convert: an adapter in another format, proven, or one line and nothing on the disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from stages.base.manifest import read_manifest
from stages.convert import convert
from stages.fetch import fetch
from stages.formats.export import FORMATS
from stages.lora import adapter
from stages.model.load import load_base
from stages.params.loading import load_params
from stages.prepare import prepare
from stages.tokenize import tokenize
from stages.train import _fingerprint, train
from tests.support.adapters import attached, configure, fill
from tests.support.imports import ROOT
from tests.support.peft_files import lora_pair, write_peft
from tests.support.rows import token_row
from tests.support.runs import make_trainer
from tests.support.tiny import write_model

OURS = Path("artifacts/adapter")


@pytest.fixture
def adapted(project: Path, tiny_llama: Path) -> Path:
    """A project with the tiny base model fetched, and an adapter on it."""
    fetch()
    write_adapter(tiny_llama)
    return project


def write_adapter(folder: Path, **options: Any) -> None:
    model = load_base(folder)[0]
    config = configure(model, **options)
    adapter.attach(model, config, seed=0)
    fill(model)
    adapter.save(OURS, model, config)


def logits(tiny_llama: Path, folder: Path) -> mx.array:
    model = load_base(tiny_llama)[0]
    adapter.load(model, folder)
    model.eval()
    return model(mx.array([[1, 2, 3]]))


def test_there_and_back_is_the_same_folder(adapted: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(to="peft", out=Path("there"))
    assert capsys.readouterr().out == "mlx → peft: there, 4 modules, read back: every number is the same\n"
    convert(Path("there"), to="mlx", out=Path("back"))
    for path in OURS.iterdir():
        assert (Path("back") / path.name).read_bytes() == path.read_bytes()
    convert(to="npz", out=Path("npz"))
    convert(Path("npz/adapters.npz"), to="mlx", out=Path("from_npz"))
    assert "npz → mlx: from_npz, 4 modules" in capsys.readouterr().out.splitlines()[-1]
    np.testing.assert_allclose(logits(tiny_llama, Path("from_npz")), logits(tiny_llama, OURS), rtol=0, atol=1e-4)


def test_an_embedding_that_is_the_head_goes_there_and_back(adapted: Path, tiny_llama: Path) -> None:
    write_adapter(tiny_llama, targets=["embed_tokens", "q_proj"])
    convert(to="peft", out=Path("there"))
    convert(Path("there"), to="mlx", out=Path("back"))
    for path in OURS.iterdir():
        assert (Path("back") / path.name).read_bytes() == path.read_bytes()


def test_without_the_base_model_it_says_so(project: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(tiny_llama)
    convert(to="peft", out=Path("there"))
    assert capsys.readouterr().out.endswith("; not checked against the base model, which is not on this machine\n")
    with pytest.raises(ValueError, match=r"elsewhere.json: no such file; make it with: python -m stages.fetch"):
        convert(to="peft", out=Path("there"), base_file=Path("elsewhere.json"))


@pytest.mark.parametrize(("source", "shown"), [("org/model", "org/model"), ("directory:model", None)])
def test_peft_is_told_the_bases_name_on_the_hub(project: Path, tiny_llama: Path, source: str, shown: Any) -> None:
    fetch()
    write_adapter(tiny_llama)
    path = Path("artifacts/base.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"source": source, "revision": "a" * 40}))
    convert(to="peft", out=Path("there"))
    config = json.loads(Path("there/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (shown, shown and "a" * 40)


def test_an_adapter_of_another_base_is_refused(adapted: Path) -> None:
    write_peft(Path("other"), lora_pair("model.layers.0.self_attn.q_proj", width=64))
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: model.layers.0.self_attn.q_proj.lora_a: shape"):
        convert(Path("other"), to="mlx", out=Path("out"))
    write_peft(Path("other"), lora_pair("model.layers.0.attn.q_proj"))
    with pytest.raises(ValueError, match=r"the base model has no attn.q_proj to put the adapter on"):
        convert(Path("other"), to="mlx", out=Path("out"))
    assert not Path("out").exists()


def test_a_refusal_leaves_what_was_there(project: Path, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "mixtral", "mixtral")
    model, config = attached(folder, "mixtral")
    adapter.save(OURS, model, config)
    write_peft(Path("out"), lora_pair("x"))
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    with pytest.raises(ValueError, match="for which PEFT has no exact form; merge the adapter instead"):
        convert(to="peft", out=Path("out"))
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    assert not list(Path().glob(".out*"))


def test_folders_that_are_not_ours_stay(adapted: Path) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").touch()
    with pytest.raises(ValueError, match=r"--out out holds thesis.txt"):
        convert(to="npz", out=Path("out"))
    with pytest.raises(ValueError, match=r"--out artifacts/adapter would replace the input"):
        convert(to="mlx", out=OURS)
    with pytest.raises(ValueError, match=r"--out mine.npz: name a folder"):
        convert(to="npz", out=Path("mine.npz"))
    with pytest.raises(ValueError, match="--to onnx: no such format; there are: mlx, peft, npz"):
        convert(to="onnx", out=Path("other"))


def test_the_help_names_every_format() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stages", "convert", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(name in done.stdout for name in FORMATS)


@pytest.mark.parametrize("to", ["peft", "npz"])
def test_training_starts_from_an_adapter_of_another_format(adapted: Path, tiny_llama: Path, to: str) -> None:
    options = ["train.iters=2", "train.learning_rate=0.01", "lora.alpha=null", "lora.scale=20.0"]
    write_adapter(tiny_llama, alpha=None, scale=20.0)
    prepare()
    tokenize()
    train(out=Path("artifacts/a"), overrides=[*options, f"train.init_adapter={OURS}"])
    details = Path("artifacts/details/train.json")
    started = json.loads(details.read_text())["valid_loss_before"]

    convert(to=to, out=Path(to))
    start = Path("npz/adapters.npz") if to == "npz" else Path(to)
    train(out=Path("artifacts/b"), overrides=[*options, f"train.init_adapter={start}"])
    assert json.loads(details.read_text())["valid_loss_before"] == started
    weights = "adapters.safetensors"
    assert Path("artifacts/a", weights).read_bytes() == Path("artifacts/b", weights).read_bytes()
    with pytest.raises(ValueError, match=r"lora.scale is 20.0 there and 2.0 here; set lora.scale to 20.0") as error:
        train(overrides=[f"train.init_adapter={start}"])
    assert str(error.value).startswith(f"{start if to == 'npz' else start / 'adapter_config.json'}: ")


def test_a_run_is_named_after_the_content_that_it_starts_from(adapted: Path, tiny_llama: Path) -> None:
    """A checkpoint of a run from other matrices is not taken up."""
    prepare()
    tokenize()
    write_adapter(tiny_llama, alpha=None, scale=20.0)
    convert(to="npz", out=Path("npz"))
    params = load_params(Path("params.yaml"), ["train.init_adapter=npz/adapters.npz"])
    tokens = {"train": Path("data/tokens/train.parquet")}
    model = load_base(tiny_llama)[0]
    adapter.attach(model, configure(model), seed=0)
    trainer = make_trainer(model, [token_row(0, 8, trained=4)], [], iters=1, batch_size=1, seed=0)
    names = [_fingerprint(trainer, params, tokens, read_manifest(Path("artifacts/base.json"))) for _ in range(2)]
    with np.load("npz/adapters.npz") as archive:
        doubled: dict[str, Any] = {name: 2 * archive[name] for name in archive.files}
    np.savez("npz/adapters.npz", **doubled)
    names.append(_fingerprint(trainer, params, tokens, read_manifest(Path("artifacts/base.json"))))
    assert names[0] == names[1] != names[2]
