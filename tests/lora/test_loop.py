"""The training loop: exact steps, exact order, nothing disturbed by looking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from stages.lora import adapter, loop
from stages.lora.batches import collate
from stages.lora.loss import mean_loss
from stages.lora.model import load_base
from stages.text.tokens import TokenRow
from tests.lora.test_adapter import config

OPTIONS: dict[str, Any] = {
    "steps": 7,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "weight_decay": 0.01,
    "warmup_steps": 2,
    "steps_per_eval": 3,
    "val_batches": 1,
    "seed": 0,
}


def run(
    tiny_llama: Path, rows: list[TokenRow], dropout: float = 0.0, **changes: Any
) -> tuple[list[loop.Step], dict[str, np.ndarray]]:
    model = load_base(tiny_llama)[0]
    adapter.attach(model, config(dropout=dropout), seed=0)
    steps = list(loop.train_steps(model, rows, rows[:5], **(OPTIONS | changes)))
    return steps, {name: np.array(array) for name, array in adapter.weights(model).items()}


def same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], two[name]) for name in one)


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(tiny_llama: Path, rows: list[TokenRow]) -> None:
    first, again, other = (run(tiny_llama, rows, dropout=0.2, seed=seed)[1] for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("change", [{"steps_per_eval": 1}, {"val_batches": 0}, {"val_batches": -1}])
def test_validation_changes_nothing_else(tiny_llama: Path, rows: list[TokenRow], change: dict[str, int]) -> None:
    assert same(run(tiny_llama, rows, dropout=0.2)[1], run(tiny_llama, rows, dropout=0.2, **change)[1])


def test_training_lowers_the_loss(tiny_llama: Path, rows: list[TokenRow]) -> None:
    steps, _ = run(tiny_llama, rows, steps=40, val_batches=-1)
    validations = [step.valid_loss for step in steps if step.valid_loss is not None]
    assert validations[-1] < 0.9 * validations[0]


def test_an_epoch_trains_on_every_row_the_last_short_batch_included(tiny_llama: Path, rows: list[TokenRow]) -> None:
    steps, _ = run(tiny_llama, rows, steps=loop.count_steps(len(rows), batch_size=4, epochs=2, iters=None))
    assert [step.epoch for step in steps] == [1, 1, 1, 2, 2, 2]
    for epoch in (1, 2):
        trained = sum(step.trained_tokens for step in steps if step.epoch == epoch)
        assert trained == sum(int(row.loss_mask.sum()) for row in rows)


def test_validation_is_before_the_first_update_at_its_interval_and_after_the_last(
    tiny_llama: Path, rows: list[TokenRow]
) -> None:
    steps, _ = run(tiny_llama, rows)
    assert [step.step for step in steps if step.valid_loss is not None] == [1, 3, 6, 7]
    untrained = load_base(tiny_llama)[0]
    adapter.attach(untrained, config(), seed=0)
    batch = collate(rows[:4])
    assert steps[0].valid_loss == pytest.approx(mean_loss(untrained, batch).item(), abs=1e-6)


def test_warm_up_rises_linearly_to_the_learning_rate(tiny_llama: Path, rows: list[TokenRow]) -> None:
    rates = [step.learning_rate for step in run(tiny_llama, rows, warmup_steps=4)[0]]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01, 0.01])
    assert run(tiny_llama, rows, warmup_steps=0)[0][0].learning_rate == pytest.approx(0.01)


def test_weight_decay_shrinks_the_weights(tiny_llama: Path, rows: list[TokenRow]) -> None:
    def norm(weight_decay: float) -> float:
        return sum(float(np.square(a).sum()) for a in run(tiny_llama, rows, weight_decay=weight_decay)[1].values())

    assert norm(5.0) < norm(0.0)


def test_one_update_is_adamw_by_the_book(tiny_llama: Path, rows: list[TokenRow]) -> None:
    """Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), algorithm 2, first step."""
    model = load_base(tiny_llama)[0]
    adapter.attach(model, config(), seed=0)
    before = {name: np.array(array) for name, array in adapter.weights(model).items()}
    _, gradients = nn.value_and_grad(model, mean_loss)(model, collate(rows[:4]))
    _, after = run(tiny_llama, rows[:4], steps=1, warmup_steps=0, learning_rate=0.1, weight_decay=0.5)
    for name, gradient in tree_flatten(gradients):
        g = np.array(gradient, dtype=np.float64)
        # At the first step the bias-corrected moments are g and g².
        expected = before[name] * (1 - 0.1 * 0.5) - 0.1 * g / (np.abs(g) + 1e-8)
        np.testing.assert_allclose(after[name], expected, rtol=1e-3, atol=2e-4)


def test_frozen_weights_do_not_change(tiny_llama: Path, rows: list[TokenRow]) -> None:
    model, untouched = load_base(tiny_llama)[0], load_base(tiny_llama)[0]
    adapter.attach(model, config(), seed=0)
    list(loop.train_steps(model, rows, [], **OPTIONS))
    inside = {
        name.replace(".linear", "").replace("norm.norm", "norm"): a for name, a in tree_flatten(model.parameters())
    }
    for name, array in tree_flatten(untouched.parameters()):
        assert mx.array_equal(inside[name], array).item(), name


def test_a_loss_that_is_not_finite_stops_with_step_rate_and_rows(tiny_llama: Path, rows: list[TokenRow]) -> None:
    model = load_base(tiny_llama)[0]
    adapter.attach(model, config(), seed=0)
    model.model.embed_tokens.weight = model.model.embed_tokens.weight * float("nan")
    with pytest.raises(ValueError, match=r"the loss is nan at step 1 \(learning rate 0.005, rows row\d+, row\d+"):
        list(loop.train_steps(model, rows, [], **OPTIONS))


def test_golden_losses(tiny_llama: Path, rows: list[TokenRow]) -> None:
    """Guards against drift: what the loop gave when it was proven right by the tests above."""
    losses = [step.loss for step in run(tiny_llama, rows)[0]]
    assert losses == pytest.approx(GOLDEN, abs=2e-4)


GOLDEN = [5.93495, 6.07372, 5.92007, 5.82535, 5.92854, 5.77072, 5.64789]
