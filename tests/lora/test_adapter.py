"""The adapter: what it is put on, how it is saved, what it refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from stages.lora import adapter
from stages.lora.model import load_base

KEYS = ("self_attn.q_proj", "self_attn.v_proj")


def config(**changes: Any) -> adapter.LoraConfig:
    plain: dict[str, Any] = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": KEYS, "layers": 2}
    return adapter.LoraConfig(**(plain | changes))


def fill(model: Any) -> None:
    """Give the zero B matrices values, so that the adapter does something."""
    arrays = [
        (name, mx.random.normal(array.shape, key=mx.random.key(i)))
        for i, (name, array) in enumerate(adapter.weights(model).items())
    ]
    model.load_weights(arrays, strict=False)


def test_just_the_targets_of_the_last_layers_are_trainable(model: Any) -> None:
    assert adapter.attach(model, config(), seed=0) == [f"model.layers.{i}.{key}" for i in (1, 2) for key in KEYS]
    assert list(adapter.weights(model)) == [
        f"model.layers.{i}.{key}.lora_{part}" for i in (1, 2) for key in KEYS for part in "ab"
    ]


def test_a_fresh_adapter_changes_nothing(model: Any) -> None:
    tokens = mx.array([[1, 2, 3]])
    before = model(tokens)
    adapter.attach(model, config(), seed=0)
    assert mx.array_equal(model(tokens), before).item()


def test_initial_weights_depend_on_the_seed_alone(tiny_llama: Path) -> None:
    def initial(seed: int, layers: int) -> dict[str, np.ndarray]:
        model = load_base(tiny_llama)[0]
        adapter.attach(model, config(layers=layers), seed=seed)
        return {name: np.array(array) for name, array in adapter.weights(model).items()}

    two, three, other = initial(0, 2), initial(0, 3), initial(1, 2)
    assert all(np.array_equal(two[name], three[name]) for name in two)
    assert not any(np.array_equal(two[name], other[name]) for name in two if name.endswith("lora_a"))
    a = [array for name, array in three.items() if name.endswith("lora_a")]
    assert len({array.tobytes() for array in a}) == len(a)


@pytest.mark.parametrize(("targets", "keys"), [(["q_proj"], KEYS[:1]), (["self_attn.v_proj", "q_proj"], KEYS)])
def test_targets_are_full_paths_or_last_parts(model: Any, targets: list[str], keys: tuple[str, ...]) -> None:
    assert adapter.resolve(model, targets, layers=2) == keys


def test_an_unknown_target_lists_what_there_is(model: Any) -> None:
    with pytest.raises(
        ValueError, match=r"'q_porj' is no linear module .* did you mean 'q_proj'\? There are: mlp.down_proj"
    ):
        adapter.resolve(model, ["q_porj"], layers=2)


def test_more_layers_than_the_base_has_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"9 layers wanted, the base model has 3"):
        adapter.resolve(model, ["q_proj"], layers=9)


def test_a_rank_beyond_the_width_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"lora.rank: 17 exceeds the width of model.layers.1.self_attn.v_proj, 16"):
        adapter.attach(model, config(rank=17), seed=0)


def test_what_is_saved_is_what_loads(tiny_llama: Path, tmp_path: Path) -> None:
    model, again = load_base(tiny_llama)[0], load_base(tiny_llama)[0]
    adapter.attach(model, config(), seed=0)
    fill(model)
    adapter.save(tmp_path / "adapter", model, config())
    assert adapter.load(again, tmp_path / "adapter") == config()
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(model(tokens), again(tokens)).item()


def test_the_same_weights_give_the_same_bytes(model: Any, tmp_path: Path) -> None:
    adapter.attach(model, config(), seed=0)
    for name in ("one", "two"):
        adapter.save(tmp_path / name, model, config())
    digests = {
        hashlib.sha256((tmp_path / name / adapter.WEIGHTS_FILE).read_bytes()).hexdigest() for name in ("one", "two")
    }
    assert len(digests) == 1


def test_mlx_lm_loads_the_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model = load_base(tiny_llama)[0]
    adapter.attach(model, config(), seed=0)
    fill(model)
    adapter.save(tmp_path, model, config())
    theirs = load_adapters(load_model(tiny_llama)[0], str(tmp_path))
    theirs.eval()
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(model(tokens), theirs(tokens)).item()
    assert len(tree_flatten(theirs.parameters())) == len(tree_flatten(model.parameters()))


def test_every_tensor_that_does_not_fit_is_listed(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_base(tiny_llama)[0]
    adapter.attach(model, config(), seed=0)
    adapter.save(tmp_path, model, config())
    path = tmp_path / adapter.CONFIG_FILE
    content = json.loads(path.read_text())
    content["lora_parameters"]["rank"] = 2
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="shape") as error:
        adapter.load(load_base(tiny_llama)[0], tmp_path)
    assert len(str(error.value).splitlines()) == 8
    assert "lora_a: shape (32, 4), the model wants (32, 2)" in str(error.value)


def test_no_adapter_is_one_clear_line(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_config.json: no such file; make it with: python -m stages.train"):
        adapter.load(model, tmp_path)
