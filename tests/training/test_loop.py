"""The training loop: exact steps, exact order, nothing disturbed by looking, and no trace of an interruption."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from stages.lora import adapter
from stages.lora.batches import Batch, collate
from stages.lora.loss import sum_loss
from stages.model.load import load_base
from stages.tokens.row import TokenRow
from stages.training.loop import Trainer, validation_rows
from stages.training.progress import Snapshot
from stages.training.record import summary
from stages.training.step import Step
from tests.support.adapters import config, fill
from tests.support.rows import token_row
from tests.support.runs import OPTIONS, make_trainer, train_options


def trainer(
    tiny_llama: Path, rows: list[TokenRow], *, dropout: float = 0.0, valid: list[TokenRow] | None = None, **changes: Any
) -> Trainer:
    model = load_base(tiny_llama)[0]
    adapter.attach(model, config(dropout=dropout), seed=0)
    return make_trainer(model, rows, rows[:5] if valid is None else valid, **(OPTIONS | changes))


def weights(run: Trainer) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in adapter.weights(run.model).items()}


def trained(tiny_llama: Path, rows: list[TokenRow], **changes: Any) -> tuple[Trainer, dict[str, np.ndarray]]:
    run = trainer(tiny_llama, rows, **changes)
    for _ in run.run():
        pass
    run.finish()
    return run, weights(run)


def same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
    assert one and one.keys() == two.keys()  # or nothing would be compared
    return all(np.array_equal(one[name], two[name]) for name in one)


def test_making_a_trainer_runs_no_model(rows: list[TokenRow]) -> None:
    step = Step(lambda model, batch: pytest.fail("it ran"), is_fused=False, is_compiled=False)
    run = Trainer(None, rows, rows[:3], train_options(iters=5), seed=0, step=step)
    assert run.steps == 5 and not run.done


def test_same_compares_something() -> None:
    with pytest.raises(AssertionError):
        same({}, {})


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(tiny_llama: Path, rows: list[TokenRow]) -> None:
    first, again, other = (trained(tiny_llama, rows, dropout=0.2, seed=seed)[1] for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


def test_dropout_does_something(tiny_llama: Path, rows: list[TokenRow]) -> None:
    assert not same(trained(tiny_llama, rows, dropout=0.2)[1], trained(tiny_llama, rows)[1])


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(every=st.integers(1, 9), report=st.integers(1, 9), batches=st.integers(-1, 3))
def test_validation_and_report_intervals_change_nothing_else(
    tiny_llama: Path, rows: list[TokenRow], every: int, report: int, batches: int
) -> None:
    plain = trained(tiny_llama, rows, dropout=0.2)[1]
    options = {"steps_per_eval": every, "steps_per_report": report, "val_batches": batches}
    assert same(plain, trained(tiny_llama, rows, dropout=0.2, **options)[1])


def test_training_lowers_the_loss(tiny_llama: Path, rows: list[TokenRow]) -> None:
    run, _ = trained(tiny_llama, rows, iters=40, val_batches=-1)
    assert run.progress.validations[-1].loss < 0.9 * run.progress.validations[0].loss


# --- rows, updates, accumulation


@pytest.mark.parametrize(
    ("size", "per_epoch"),
    [
        ({"batch_size": 4}, 3),
        ({"batch_size": 2, "grad_accumulation": 2}, 3),
        ({"batch_size": 3}, 4),
        ({"batch_size": 2, "grad_accumulation": 3}, 2),
        ({"batch_size": 20}, 1),
        ({"batch_size": None, "batch_tokens": 60}, 6),
        ({"batch_size": None, "batch_tokens": 60, "grad_accumulation": 2}, 3),
        ({"batch_size": None, "batch_tokens": 1}, 11),
    ],
)
def test_every_epoch_trains_on_every_row_once(
    tiny_llama: Path, rows: list[TokenRow], size: dict[str, Any], per_epoch: int
) -> None:
    run = trainer(tiny_llama, rows, iters=2 * per_epoch, **size)
    for epoch in (0, 1):
        seen = [row.id for step in range(per_epoch) for row in run._rows(epoch * per_epoch + step + 1)]
        assert sorted(seen) == sorted(row.id for row in rows)
    list(run.run())
    assert run.progress.total.trained_tokens == 2 * sum(int(row.loss_mask.sum()) for row in rows)
    assert run.progress.total.real_tokens == 2 * sum(len(row.input_ids) for row in rows)
    assert summary(run)["epochs"] == 2


def watched_shapes(run: Trainer) -> list[tuple[int, ...]]:
    """The shape of each batch that gradients are taken of from now on, (rows, tokens)."""
    shapes: list[tuple[int, ...]] = []
    plain = run.step.value_and_grad

    def watched(model: Any, batch: Batch) -> Any:
        shapes.append(batch.inputs_BxL.shape)
        return plain(model, batch)

    run.step = replace(run.step, value_and_grad=watched)
    return shapes


def test_a_budget_of_tokens_bounds_each_micro_batch(tiny_llama: Path, rows: list[TokenRow]) -> None:
    run = trainer(tiny_llama, rows, iters=6, batch_size=None, batch_tokens=60, grad_accumulation=2)
    shapes = watched_shapes(run)
    list(run.run())
    assert len(shapes) == 12
    assert all(count == 1 or count * (length + 1) <= 60 for count, length in shapes)


@pytest.mark.parametrize(("size", "chosen"), [({"batch_size": 4}, 8), ({"batch_size": None, "batch_tokens": 60}, 6)])
def test_validation_is_on_as_many_rows_as_its_batches_hold(
    rows: list[TokenRow], size: dict[str, Any], chosen: int
) -> None:
    assert len(validation_rows(rows, train_options(**(OPTIONS | size | {"val_batches": 2})))) == chosen
    assert len(validation_rows(rows, train_options(**(OPTIONS | size | {"val_batches": -1})))) == len(rows)
    assert len(validation_rows(rows, train_options(**(OPTIONS | size | {"val_batches": 0})))) == 0


def test_a_processor_takes_few_tokens_at_a_time(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [token_row(i, 5 + 4 * i, trained=1 + 2 * i) for i in range(8)]
    adapter.attach(model, config(), seed=0)
    fill(model)
    found = make_trainer(model, many, [], **(OPTIONS | {"batch_size": 8}))
    _, whole = found._gradients(many)
    seen = watched_shapes(found)
    monkeypatch.setattr("stages.training.loop.CPU_TOKENS", 40)
    monkeypatch.setattr("stages.training.loop.on_cpu", lambda: True)
    _, parts = found._gradients(many)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert sum(rows for rows, _ in seen) == 8 and all(rows == 1 or rows * (length + 1) <= 40 for rows, length in seen)
    seen.clear()
    monkeypatch.setattr("stages.training.loop.on_cpu", lambda: False)
    found._gradients(many)
    assert len(seen) == 1


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(batch_size=st.integers(1, 8), seed=st.integers(0, 50))
def test_gradients_do_not_depend_on_the_micro_batches(tiny_llama: Path, batch_size: int, seed: int) -> None:
    rows = [token_row(i, 5 + 4 * i, trained=1 + 2 * i, seed=seed) for i in range(8)]
    model = load_base(tiny_llama)[0]
    adapter.attach(model, config(), seed=0)
    fill(model)
    whole = make_trainer(model, rows, [], **(OPTIONS | {"batch_size": 8}))._gradients(rows)
    parts = make_trainer(model, rows, [], **(OPTIONS | {"batch_size": batch_size}))._gradients(rows)
    assert parts[1].loss == pytest.approx(whole[1].loss, rel=1e-5)
    for name, gradient in whole[0].items():
        np.testing.assert_allclose(np.array(parts[0][name]), np.array(gradient), rtol=2e-3, atol=2e-5)


def test_an_update_over_two_times_four_rows_equals_one_over_eight(tiny_llama: Path, rows: list[TokenRow]) -> None:
    eight = trained(tiny_llama, rows, batch_size=8, iters=4)[1]
    two_fours = trained(tiny_llama, rows, batch_size=4, grad_accumulation=2, iters=4)[1]
    for name, array in eight.items():
        np.testing.assert_allclose(two_fours[name], array, atol=2e-4)


def test_a_row_with_nothing_to_learn_is_refused_by_name(tiny_llama: Path, rows: list[TokenRow]) -> None:
    rows[3].loss_mask[:] = False
    with pytest.raises(ValueError, match=r"row row3 \(rows.jsonl:3\) has no token to train on"):
        trainer(tiny_llama, rows)


# --- updates by the book


def test_one_update_is_adamw_by_the_book(tiny_llama: Path, rows: list[TokenRow]) -> None:
    """Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), algorithm 2, first step."""
    before = weights(trainer(tiny_llama, rows))
    run = trainer(tiny_llama, rows[:4], iters=1, warmup_steps=0, learning_rate=0.1, weight_decay=0.5)
    batch = collate(rows[:4])
    _, gradients = nn.value_and_grad(run.model, sum_loss)(run.model, batch)
    list(run.run())
    after = weights(run)
    for name, gradient in tree_flatten(gradients):
        g = np.array(gradient, dtype=np.float64) / batch.trained_tokens
        # At the first step the bias-corrected moments are g and g².
        expected = before[name] * (1 - 0.1 * 0.5) - 0.1 * g / (np.abs(g) + 1e-8)
        np.testing.assert_allclose(after[name], expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor", "lion", "muon"])
def test_every_optimizer_learns_and_resumes(tiny_llama: Path, rows: list[TokenRow], name: str) -> None:
    rate = {"sgd": 3.0, "lion": 3e-3}.get(name, 1e-2)
    options: dict[str, Any] = {"optimizer": name, "learning_rate": rate, "weight_decay": 0.0, "iters": 20}
    run, straight = trained(tiny_llama, rows, val_batches=-1, **options)
    assert run.progress.validations[-1].loss < run.progress.validations[0].loss - 0.02
    assert same(straight, interrupted(tiny_llama, rows, after=[9], val_batches=-1, **options)[1])


@pytest.mark.parametrize(
    ("change", "stable"),
    [
        ({"betas": [0.5, 0.9]}, False),
        ({"weight_decay": 5.0}, False),
        ({"bias_correction": False}, False),
        ({"patience": 99}, True),
    ],
)
def test_optimizer_options_reach_it(
    tiny_llama: Path, rows: list[TokenRow], change: dict[str, Any], stable: bool
) -> None:
    assert same(trained(tiny_llama, rows)[1], trained(tiny_llama, rows, **change)[1]) == stable


def test_gradients_are_clipped_to_their_norm(tiny_llama: Path, rows: list[TokenRow]) -> None:
    options: dict[str, Any] = {"optimizer": "sgd", "betas": [0.0, 0.0], "weight_decay": 0.0, "warmup_steps": 0}
    before = weights(trainer(tiny_llama, rows))
    run, after = trained(tiny_llama, rows, iters=1, learning_rate=1.0, max_grad_norm=1e-3, **options)
    moved = math.sqrt(sum(float(np.square(after[name] - before[name]).sum()) for name in before))
    assert moved == pytest.approx(1e-3, rel=1e-2)
    assert run.progress.reports[0].grad_norm > 1e-2  # as it was before clipping


def test_recomputed_activations_give_the_same_gradients(tiny_llama: Path, rows: list[TokenRow]) -> None:
    plain, recomputed = (trainer(tiny_llama, rows, grad_checkpoint=on) for on in (False, True))
    assert type(plain.model.layers[2]) is not type(recomputed.model.layers[2])
    assert type(plain.model.layers[0]) is type(recomputed.model.layers[0])  # nothing to recompute below the adapter
    for run in (plain, recomputed):
        list(run.run())
    assert same(weights(plain), weights(recomputed))


def test_frozen_weights_do_not_change(tiny_llama: Path, rows: list[TokenRow]) -> None:
    untouched = load_base(tiny_llama)[0]
    run, _ = trained(tiny_llama, rows)
    parameters = tree_flatten(run.model.parameters())
    inside = {name.replace(".linear", ""): array for name, array in parameters}
    for name, array in tree_flatten(untouched.parameters()):
        assert mx.array_equal(inside[name], array).item(), name


# --- validation, the best adapter, early stopping


def test_validation_is_before_the_first_update_at_its_interval_and_after_the_last(
    tiny_llama: Path, rows: list[TokenRow]
) -> None:
    run, _ = trained(tiny_llama, rows)
    assert [validation.step for validation in run.progress.validations] == [0, 3, 6, 7]
    untrained, batch = trainer(tiny_llama, rows), collate(rows[:4])
    expected = sum_loss(untrained.model, batch).item() / batch.trained_tokens
    assert run.progress.validations[0].loss == pytest.approx(expected, abs=1e-5)


def overfitting(tiny_llama: Path, rows: list[TokenRow], **changes: Any) -> tuple[Trainer, dict[str, np.ndarray]]:
    """A run whose validation loss on other rows falls first and rises then."""
    valid = [token_row(i, 20, trained=10, seed=5) for i in range(4)]
    options = {"iters": 60, "steps_per_eval": 2, "learning_rate": 0.05, "valid": valid}
    return trained(tiny_llama, rows[:4], **(options | changes))


def test_keep_best_gives_the_weights_of_the_lowest_validation_loss(tiny_llama: Path, rows: list[TokenRow]) -> None:
    run, kept = overfitting(tiny_llama, rows, keep="best")
    best = run.progress.best
    assert best is not None and best.step < 60
    assert best.loss == min(v.loss for v in run.progress.validations if v.step)
    assert same(kept, overfitting(tiny_llama, rows, iters=best.step)[1])
    assert not same(kept, overfitting(tiny_llama, rows, keep="last")[1])


def test_patience_stops_after_so_many_validations_without_a_better_one(tiny_llama: Path, rows: list[TokenRow]) -> None:
    run, _ = overfitting(tiny_llama, rows, patience=3)
    best = run.progress.best
    assert run.progress.stopped_early and best is not None
    assert run.progress.step == best.step + 3 * 2


@pytest.mark.parametrize("change", [{"keep": "best"}, {"patience": 2}])
def test_what_needs_validation_says_so_without_it(
    tiny_llama: Path, rows: list[TokenRow], change: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="need validation rows"):
        trainer(tiny_llama, rows, val_batches=0, **change)


# --- losses that are not finite


def test_a_loss_that_is_not_finite_stops_with_step_rate_and_rows(tiny_llama: Path, rows: list[TokenRow]) -> None:
    run = trainer(tiny_llama, rows, val_batches=0, learning_rate=1e-2)
    events = run.run()
    next(events)
    before = weights(run)
    run.model.model.embed_tokens.weight = run.model.model.embed_tokens.weight * float("nan")
    with pytest.raises(ValueError, match=r"the loss is nan at step 2 \(learning rate 0.01, rows row\d+, row\d+"):
        next(events)
    assert run.progress.step == 1
    assert same(before, weights(run))


def test_a_gradient_that_is_not_finite_stops_before_the_update(tiny_llama: Path, rows: list[TokenRow]) -> None:
    run = trainer(tiny_llama, rows, val_batches=0)
    before = weights(run)
    plain = run.step.value_and_grad

    def overflowing(model: Any, batch: Any) -> Any:
        loss, tree = plain(model, batch)
        tree["model"]["layers"][2]["self_attn"]["q_proj"]["lora_b"] *= float("inf")
        return loss, tree

    run.step = replace(run.step, value_and_grad=overflowing)
    with pytest.raises(ValueError, match=r"the gradient's norm is (nan|inf) at step 1"):
        next(run.run())
    assert same(before, weights(run))


# --- interruption


def interrupted(
    tiny_llama: Path, rows: list[TokenRow], *, after: list[int], **changes: Any
) -> tuple[Trainer, dict[str, np.ndarray]]:
    """A run that ends after each of these events and goes on from its snapshot in another Trainer."""
    snapshot: Snapshot | None = None
    for events in [*after, 10**6]:
        run = trainer(tiny_llama, rows, **changes)
        if snapshot is not None:
            run.restore(snapshot)
        for number, _ in enumerate(run.run(), start=1):
            if number == events:
                break
        snapshot = run.snapshot()
    run.finish()
    return run, weights(run)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    after=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    keep=st.sampled_from(["best", "last"]),
    size=st.sampled_from([{"batch_size": 2}, {"batch_size": None, "batch_tokens": 60}]),
)
def test_an_interrupted_run_ends_in_the_same_weights_and_history(
    tiny_llama: Path, rows: list[TokenRow], after: list[int], keep: str, size: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"dropout": 0.3, "keep": keep, "steps_per_report": 2, "grad_accumulation": 2}
    options |= {"schedule": "cosine", **size}
    straight, expected = trained(tiny_llama, rows, **options)
    resumed, found = interrupted(tiny_llama, rows, after=after, **options)
    assert same(expected, found)
    assert resumed.progress == straight.progress


def test_golden_losses(tiny_llama: Path, rows: list[TokenRow]) -> None:
    """Guards against drift: what the loop gave when the tests above had proven it right."""
    run, _ = trained(tiny_llama, rows)
    assert [report.loss for report in run.progress.reports] == pytest.approx(GOLDEN, abs=2e-4)


GOLDEN = [5.93495, 6.07372, 5.92007, 5.82535, 5.92854, 5.77072, 5.64789]
