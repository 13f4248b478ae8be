"""The sum of several adapters: the same update as all of them, weighted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from stages.lora import adapter, adapter_files
from stages.merging.combine import Part, load_sum, names_of
from stages.merging.fuse import fuse
from stages.model.load import load_base
from tests.support.adapters import TARGETS, configure
from tests.support.tiny import write_llama, write_model


def saved(base: Path, folder: Path, seed: int, **options: Any) -> Path:
    """An adapter of random values on a base, in a folder."""
    model = load_base(base)[0]
    config = configure(model, **options)
    adapter.attach(model, config, seed=seed)
    model.load_weights(
        [
            (name, mx.random.normal(array.shape, key=mx.random.key(100 * seed + i)))
            for i, (name, array) in enumerate(adapter.weights(model).items())
        ],
        strict=False,
    )
    adapter.save(folder, model, config)
    return folder


def merged(base: Path, parts: list[Part]) -> dict[str, np.ndarray]:
    """The weight of each module that the parts touch."""
    model = load_base(base)[0]
    load_sum(model, parts)
    names = fuse(model, dtype=mx.float32, requantize=False)
    modules = dict(model.named_modules())
    return {name: np.array(modules[name].weight) for name in names}


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gemma2"])
def test_the_sum_has_all_updates_weighted(kind: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", kind)
    one = saved(base, tmp_path / "one", 1, targets=TARGETS[kind], rank=4)
    other = saved(base, tmp_path / "other", 2, targets=TARGETS[kind][:1], rank=8, alpha=4.0, layers="all")
    plain = {name: np.array(module.weight) for name, module in load_base(base)[0].named_modules() if "weight" in module}
    of_one, of_other = merged(base, [Part(one)]), merged(base, [Part(other)])
    both = merged(base, [Part(one, 0.25), Part(other, -2.0)])
    assert both.keys() == of_one.keys() | of_other.keys()
    for name, found in both.items():
        updates = [(0.25, of_one.get(name, plain[name])), (-2.0, of_other.get(name, plain[name]))]
        wanted = plain[name] + sum(weight * (weights - plain[name]) for weight, weights in updates)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_a_part_alone_is_the_adapter_itself(tiny_llama: Path, tmp_path: Path) -> None:
    part = Part(saved(tiny_llama, tmp_path / "one", 1))
    model, again = load_base(tiny_llama)[0], load_base(tiny_llama)[0]
    load_sum(model, [part])
    adapter.load(again, part.folder)
    one, other = adapter.weights(model), adapter.weights(again)
    assert one.keys() == other.keys() == set(names_of([part]))
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)


def test_a_dora_has_no_sum(tiny_llama: Path, tmp_path: Path) -> None:
    parts = [Part(saved(tiny_llama, tmp_path / kind, 1, type=kind)) for kind in ("lora", "dora")]
    with pytest.raises(ValueError, match=r"dora: a DoRA adapter .* no sum with another; merge it alone"):
        load_sum(load_base(tiny_llama)[0], parts)


def test_an_adapter_of_another_shape_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    other = write_llama(tmp_path / "wide", hidden_size=96)
    parts = [Part(saved(tiny_llama, tmp_path / "one", 1)), Part(saved(other, tmp_path / "other", 2))]
    with pytest.raises(ValueError, match=r"other.*: shape .*, the model wants"):
        load_sum(load_base(tiny_llama)[0], parts)


def test_an_adapter_says_what_it_was_trained_on(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_base(tiny_llama)[0]
    config = configure(model)
    adapter.attach(model, config, seed=0)
    adapter.save(tmp_path / "adapter", model, config, base="1" * 64)
    adapter_files.check_base(tmp_path / "adapter", "1" * 64)
    with pytest.raises(ValueError, match=r"adapter_config\.json: trained on another base model \(111111111111, base"):
        adapter_files.check_base(tmp_path / "adapter", "2" * 64)
    path = tmp_path / "adapter" / adapter_files.CONFIG_FILE
    content = json.loads(path.read_text())
    del content["lorabuild"]
    path.write_text(json.dumps(content))
    adapter_files.check_base(tmp_path / "adapter", "2" * 64)  # mlx-lm's own does not say
