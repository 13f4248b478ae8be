"""Models by name: adapters are switched on one base, which stays what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from stages.base.manifest import read_manifest
from stages.formats.base import Base
from stages.formats.export import export
from stages.lora import adapter, adapter_files
from stages.model.load import load_base
from stages.params.loading import load_params
from stages.serving.models import Models, adapter_folders, open_models
from tests.support.adapters import config, fill
from tests.support.serving import SHAPES
from tests.support.tiny import write_llama

TOKENS = mx.array([[1, 2, 3, 4]])


@pytest.fixture
def models(models_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Models:
    return opened(models_folder, monkeypatch, adapters=["one", "two"])


def opened(models_folder: Path, monkeypatch: pytest.MonkeyPatch, **choice: Any) -> Models:
    monkeypatch.chdir(models_folder)
    monkeypatch.setenv("LORABUILD_STORE", str(models_folder / "store"))
    return open_models(load_params(), merged=Path("merged"), manifest=Path("artifacts/base.json"), **choice)


def loaded(models_folder: Path, name: str) -> np.ndarray[Any, Any]:
    """The logits of a model that was loaded for itself."""
    model = load_base(models_folder / ("merged" if name == "merged" else "base"))[0]
    if name in SHAPES:
        adapter.load(model, models_folder / name)
    return np.array(model(TOKENS))


def test_each_name_is_the_model_that_it_says(models_folder: Path, models: Models) -> None:
    assert models.names == ("base", "one", "two")
    for name in ("one", "two", "base", "two", "one", "base"):
        models.switch(name)
        assert np.array_equal(np.array(models.model(TOKENS)), loaded(models_folder, name)), name


def test_a_second_adapter_of_the_same_name_is_refused(models_folder: Path, models: Models) -> None:
    with pytest.raises(ValueError, match=r"two: the name one is taken; give another, as NAME=.*two"):
        models.add("one", models_folder / "two")
    models.switch("one")
    assert np.array_equal(np.array(models.model(TOKENS)), loaded(models_folder, "one"))


@pytest.mark.parametrize("to", ["peft", "npz"])
def test_an_adapter_of_another_format_answers_as_its_own(models_folder: Path, models: Models, to: str) -> None:
    base = Base(model=load_base(models_folder / "base")[0])
    out = models_folder / f"one-{to}"
    export(adapter_files.read(models_folder / "one"), out, to, base)
    models.add(to, out / "adapters.npz" if to == "npz" else out)
    models.switch(to)
    np.testing.assert_allclose(np.array(models.model(TOKENS)), loaded(models_folder, "one"), atol=1e-5)


def test_a_switch_loads_nothing(models: Models) -> None:
    def weight() -> Any:
        module = models.model.layers[2].self_attn.q_proj
        return module.linear.weight if "lora_a" in module else module.weight

    before = weight()
    mx.eval(models.model(TOKENS))
    memory = mx.get_active_memory()
    for name in ("one", "two", "one"):
        models.switch(name)
        assert mx.get_active_memory() <= memory
    assert weight() is before


def test_alone_it_is_the_merged_model_or_the_base(models_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for choice, name in (({}, "merged"), ({"base": True}, "base")):
        models = opened(models_folder, monkeypatch, **choice)
        assert models.names == (name,)
        assert np.array_equal(np.array(models.model(TOKENS)), loaded(models_folder, name))


def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(
    models_folder: Path, models: Models, tmp_path: Path
) -> None:
    other = load_base(write_llama(tmp_path / "wide", hidden_size=64))[0]
    adapter.attach(other, config(), seed=0)
    adapter.save(tmp_path / "wide_adapter", other, config())
    models.switch("one")
    with pytest.raises(ValueError, match="the model wants"):
        models.add("wide", tmp_path / "wide_adapter")
    assert models.names == ("base", "one", "two")
    assert np.array_equal(np.array(models.model(TOKENS)), loaded(models_folder, "one"))


def test_an_adapter_of_another_base_is_refused(models_folder: Path, models: Models, tmp_path: Path) -> None:
    model = load_base(models_folder / "base")[0]
    adapter.attach(model, config(), seed=0)
    adapter.save(tmp_path / "own", model, config(), base=read_manifest(Path("artifacts/base.json")).weights_identity)
    adapter.save(tmp_path / "others", model, config(), base="2" * 64)
    models.add("own", tmp_path / "own")
    with pytest.raises(ValueError, match=r"others/adapter_config\.json: trained on another base model \(222222222222"):
        models.add("others", tmp_path / "others")
    assert models.names == ("base", "one", "two", "own")


def test_no_adapter_goes_onto_a_merged_model(models_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="start with --base"):
        opened(models_folder, monkeypatch).add("one", models_folder / "one")


def test_dropout_is_for_training(tmp_path: Path, models_folder: Path, models: Models) -> None:
    model = load_base(models_folder / "base")[0]
    adapter.attach(model, config(dropout=0.5), seed=0)
    fill(model)
    adapter.save(tmp_path / "dropping", model, config(dropout=0.5))
    models.add("dropping", tmp_path / "dropping")
    models.switch("dropping")
    assert mx.array_equal(models.model(TOKENS), models.model(TOKENS))


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("targets", [["all-linear"], ["embed_tokens", "q_proj"], ["lm_head"]], ids=str)
def test_an_adapter_comes_off_and_goes_back_on(tmp_path: Path, architecture: str, targets: list[str]) -> None:
    from tests.support.tiny import write_model

    model = load_base(write_model(tmp_path / "base", architecture, tie_word_embeddings=False))[0]
    bare = np.array(model(TOKENS))
    adapter.attach(model, config(keys=_keys(model, targets)), seed=0)
    fill(model)
    worn = np.array(model(TOKENS))
    assert not np.array_equal(bare, worn)
    layers = adapter.take_off(model)
    assert np.array_equal(np.array(model(TOKENS)), bare)
    assert adapter.weights(model) == {}
    adapter.put_on(model, layers)
    assert np.array_equal(np.array(model(TOKENS)), worn)


def _keys(model: Any, targets: list[str]) -> tuple[str, ...]:
    from tests.support.adapters import configure

    return configure(model, targets=targets).keys


def test_names_of_adapters(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    assert adapter_folders(["runs/x", "y=runs/x/adapter"]) == {"x": Path("runs/x"), "y": Path("runs/x/adapter")}
    with pytest.raises(ValueError, match="name x is taken; give another, as NAME=b/x"):
        adapter_folders(["a/x", "b/x"])
    with pytest.raises(ValueError, match="is no name"):
        adapter_folders([str(tmp_path / "a=b")])
    with pytest.raises(ValueError, match="base is taken"):
        adapter_folders(["base=a"])


def test_a_missing_model_is_one_line(models_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models_folder)
    with pytest.raises(ValueError, match="nowhere: no merged model; make it with"):
        open_models(load_params(), merged=Path("nowhere"), manifest=Path("artifacts/base.json"))
    with pytest.raises(ValueError, match="there are: merged"):
        open_models(load_params(), merged=Path("merged"), manifest=Path("artifacts/base.json")).switch("x")
