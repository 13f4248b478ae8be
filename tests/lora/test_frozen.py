"""Frozen layers: their states, fed in, change neither loss nor gradients; a model that cannot be cut is noticed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from stages.lora import adapter
from stages.lora.batches import collate
from stages.lora.frozen import FrozenLayers
from stages.lora.frozen_cache import check_frozen
from stages.lora.loss import sum_loss
from stages.lora.state_cache import StateCache
from stages.lora.targets import frozen_layers
from stages.model.load import load_base
from stages.scoring.score import score_rows
from stages.tokens.row import TokenRow
from tests.support import adapters
from tests.support.adapters import DORA, TARGETS, fill
from tests.support.runs import make_trainer
from tests.support.tiny import CONFIGS, write_model

OUTSIDE = {"embed_tokens", "lm_head"}


def attached(directory: Path, name: str, kind: str = "lora", **options: Any) -> tuple[Any, int]:
    """The model with an adapter on its last two layers, and how many lie below."""
    model = load_base(directory, **options)[0]
    targets = (DORA.get(name) if kind == "dora" else None) or TARGETS[name]
    config = adapters.configure(model, type=kind, targets=[t for t in targets if t not in OUTSIDE], layers=2)
    adapter.attach(model, config, seed=0)
    fill(model)
    return model, frozen_layers(adapter.weights(model), len(model.layers))


@pytest.fixture(scope="module", params=list(CONFIGS))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Four layers, so that two of a kind are left out where kinds alternate."""
    folder = tmp_path_factory.mktemp(f"four_{request.param}")
    return request.param, write_model(folder, request.param, num_hidden_layers=4)


def loss_and_gradients(model: Any, rows: list[TokenRow], frozen: FrozenLayers | None) -> tuple[float, Any]:
    loss, gradients = nn.value_and_grad(model, sum_loss)(model, collate(rows, frozen))
    return loss.item(), {name: np.array(gradient) for name, gradient in tree_flatten(gradients)}


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_loss_and_gradients_are_those_of_the_whole_model(
    base: tuple[str, Path], rows: list[TokenRow], tmp_path: Path, kind: str
) -> None:
    model, layers = attached(base[1], base[0], kind)
    assert layers == 2
    frozen = FrozenLayers(model, layers, StateCache(tmp_path))
    assert check_frozen(frozen, rows).passed
    model.train()
    plain_loss, plain = loss_and_gradients(model, rows[2:7], None)
    for _ in ("computed", "read"):
        loss, gradients = loss_and_gradients(model, rows[2:7], frozen)
        assert loss == pytest.approx(plain_loss, rel=1e-5)
        assert set(gradients) == set(plain)
        for name in plain:
            off = np.abs(gradients[name] - plain[name]).max() / np.abs(plain[name]).max()
            assert off < 1e-2, name  # rounding: rows alone and in a batch differ by up to 3e-3


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mixtral"])
def test_a_packed_base_is_cut_too(name: str, rows: list[TokenRow], tmp_path: Path) -> None:
    # bfloat16 as on a GPU: states are kept as they are.
    directory = write_model(tmp_path / "base", name, quantize=True, dtype="float16", num_hidden_layers=4)
    dtype = "float32" if name == "mixtral" else "bfloat16"
    model, layers = attached(directory, name, dtype=dtype, dequantize=False)
    frozen = FrozenLayers(model, layers, StateCache(tmp_path / "cache"))
    assert check_frozen(frozen, rows).passed
    computed = frozen.states(rows).hidden_BxLxD
    assert computed.dtype == getattr(mx, dtype)
    assert mx.array_equal(frozen.states(rows).hidden_BxLxD, computed).item()


def test_rows_of_both_kinds_of_positions_are_not_cut(rows: list[TokenRow], tmp_path: Path) -> None:
    frozen = FrozenLayers(*attached(write_model(tmp_path, "phi3_v", num_hidden_layers=4), "phi3_v"))
    assert [len(row.input_ids) - 1 for row in rows[8:10]] == [29, 32]  # the original context has 32
    assert frozen.unfit(rows[:10]) is None
    assert "over 32 tokens" in (frozen.unfit(rows) or "")


def test_the_frozen_layers_do_not_run_again(model: Any, rows: list[TokenRow], tmp_path: Path) -> None:
    calls = []

    class Counted(type(model.layers[0])):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return super().__call__(*args, **kwargs)

    model.layers[0].__class__ = Counted
    frozen = FrozenLayers(model, 1, StateCache(tmp_path))
    collate(rows, frozen)
    assert len(calls) == len(rows)
    sum_loss(model, collate(rows, frozen))
    FrozenLayers(model, 1, StateCache(tmp_path)).states(rows)  # another process
    assert len(calls) == len(rows)


def test_a_row_has_the_same_states_in_any_company(model: Any, rows: list[TokenRow]) -> None:
    frozen = FrozenLayers(model, 1)
    alone = frozen.states(rows[3:4]).hidden_BxLxD[0]
    among = frozen.states(rows).hidden_BxLxD[3]
    assert mx.array_equal(among[: len(alone)], alone).item()
    assert (among[len(alone) :] == alone[-1]).all().item()


def test_scores_are_those_of_the_whole_model(model: Any, rows: list[TokenRow]) -> None:
    plain = dict(score_rows(model, rows, batch_size=4))
    cut = dict(score_rows(model, rows, batch_size=4, frozen=FrozenLayers(model, 1)))
    assert [cut[i].loss_sum for i in plain] == pytest.approx([plain[i].loss_sum for i in plain], rel=1e-5)
    assert [cut[i].correct for i in plain] == [plain[i].correct for i in plain]


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_a_run_ends_where_the_plain_one_does(
    tiny_llama: Path, rows: list[TokenRow], tmp_path: Path, grad_checkpoint: bool
) -> None:
    weights = []
    for cut in (False, True):
        model = load_base(tiny_llama, dtype="float32")[0]
        adapter.attach(model, adapters.configure(model, layers=2, dropout=0.2), seed=0)
        frozen = FrozenLayers(model, 1, StateCache(tmp_path)) if cut else None
        trainer = make_trainer(model, rows, rows[:3], frozen=frozen, iters=8, grad_checkpoint=grad_checkpoint)
        list(trainer.run())
        weights.append({name: np.array(array) for name, array in adapter.weights(model).items()})
    for name, plain in weights[0].items():
        np.testing.assert_allclose(weights[1][name], plain, rtol=1e-3, atol=1e-4, err_msg=name)


def test_states_of_another_model_are_noticed(model: Any, rows: list[TokenRow], tmp_path: Path) -> None:
    frozen = FrozenLayers(model, 1, StateCache(tmp_path))
    frozen.states(rows)
    model.layers[0].self_attn.o_proj.weight *= 2
    assert "off in the logits" in (check_frozen(frozen, rows).reason or "")


def test_a_model_whose_layers_look_further_back_is_noticed(model: Any, rows: list[TokenRow]) -> None:
    class WithEmbedding(type(model.layers[0])):  # type: ignore[misc]
        """As in models that add what an early layer computed further up."""

        def __call__(self, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            model.kept = hidden
            return super().__call__(hidden, *args, **kwargs)

    class WithSum(type(model.layers[2])):  # type: ignore[misc]
        def __call__(self, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            return super().__call__(hidden, *args, **kwargs) + model.pop("kept", mx.zeros(1))

    model.layers[0].__class__, model.layers[2].__class__ = WithEmbedding, WithSum
    assert "off in the logits" in (check_frozen(FrozenLayers(model, 1), rows).reason or "")


def test_a_model_whose_layers_hand_on_more_is_trained_whole(model: Any, rows: list[TokenRow]) -> None:
    class Pairs(type(model.layers[0])):  # type: ignore[misc]
        def __call__(self, given: Any, *args: Any, **kwargs: Any) -> Any:
            hidden, first = given if isinstance(given, tuple) else (given, given)
            hidden = super().__call__(hidden, *args, **kwargs)
            return hidden + first if self is model.layers[-1] else (hidden, first)

    kind = Pairs
    for layer in model.layers:
        layer.__class__ = kind
    model.layers[1].__class__ = type("Strict", (kind,), {"__call__": lambda self, given, *a, **k: (
        kind.__call__(self, (given[0], given[1]), *a, **k) if isinstance(given, tuple) else given["no array"]
    )})  # fmt: skip
    adapter.attach(model, adapters.configure(model, layers=1), seed=0)
    assert "cannot be cut apart" in (check_frozen(FrozenLayers(model, 2), rows).reason or "")
    trainer = make_trainer(model, rows, rows[:3], iters=2)
    assert len(list(trainer.run())) == 3


def test_a_model_that_hides_its_layers_is_noticed(model: Any, rows: list[TokenRow]) -> None:
    class Copies(type(model)):  # type: ignore[misc]
        @property
        def layers(self) -> list[nn.Module]:
            return [copy.copy(layer) for layer in self.model.layers]

    model.__class__ = Copies
    assert "never called" in (check_frozen(FrozenLayers(model, 1), rows).reason or "")


def test_the_model_is_whole_again_after_an_error(model: Any, rows: list[TokenRow]) -> None:
    before, frozen = list(model.layers), FrozenLayers(model, 1)
    batch = collate(rows, frozen)
    model.layers[2].mlp = None
    with pytest.raises(TypeError):
        sum_loss(model, batch)
    assert model.layers == before


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.layers.2.self_attn.q_proj.lora_a", "model.layers.3.mlp.down_proj.lora_a"], 2),
        (["model.layers.0.mlp.down_proj.lora_b"], 0),
        (["model.embed_tokens.lora_a", "model.layers.2.mlp.down_proj.lora_b"], 0),
        (["lm_head.lora_a"], 3),
        (["transformer.h.2.attn.c_attn.lora_a"], 0),
        (["model.kv_reuse_layers.2.self_attn.q_proj.lora_a", "model.layers.3.self_attn.q_proj.lora_a"], 0),
        (["wpe.lora_a", "model.layers.2.mlp.down_proj.lora_b"], 0),
        (["lm_head.lora_a", "language_model.model.layers.1.mlp.down_proj.lora_b"], 1),
    ],
)
def test_what_lies_below_every_adapted_module_is_frozen(names: list[str], expected: int) -> None:
    assert frozen_layers(names, 4) == expected
