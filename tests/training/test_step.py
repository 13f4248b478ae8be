"""The compiled step: what the plain one gives, of batches in few shapes; and the plain one where it cannot be."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from stages.lora import adapter
from stages.lora.batches import collate
from stages.lora.loss import fused_sum_loss, sum_loss
from stages.model.load import load_base, on_cpu
from stages.tokens.row import TokenRow
from stages.training.loop import Trainer
from stages.training.step import compiled_step, plain_step
from tests.support.adapters import adapted, config
from tests.support.rows import token_row
from tests.support.runs import make_trainer
from tests.support.tiny import write_model

compiles = pytest.mark.skipif(on_cpu() and shutil.which("g++") is None, reason="MLX compiles with g++ on a CPU")


def trainer(folder: Path, rows: list[TokenRow], *, dropout: float = 0.0, **changes: Any) -> Trainer:
    model = load_base(folder)[0]
    adapter.attach(model, config(dropout=dropout), seed=0)
    options: dict[str, Any] = {"iters": 6, "batch_size": 2, "grad_accumulation": 2, "learning_rate": 1e-2, "seed": 0}
    return make_trainer(model, rows, rows[:4], **(options | {"compile": "on"} | changes))


def weights(run: Trainer) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in adapter.weights(run.model).items()}


def trained(folder: Path, rows: list[TokenRow], **changes: Any) -> tuple[Trainer, dict[str, np.ndarray]]:
    run = trainer(folder, rows, **changes)
    list(run.run())
    return run, weights(run)


@pytest.fixture
def even_rows() -> list[TokenRow]:
    """Rows that fill the compiled shapes: a batch is the same, compiled or not, and so is the dropout in it."""
    return [token_row(i, 33, trained=16) for i in range(8)]


@compiles
@pytest.mark.parametrize("changes", [{}, {"fused_loss": False}, {"grad_checkpoint": True}])
def test_compiled_training_ends_in_the_plain_weights(
    tiny_llama: Path, rows: list[TokenRow], changes: dict[str, Any]
) -> None:
    run, found = trained(tiny_llama, rows, **changes)
    assert run.step.is_compiled and run.step.notes == ()
    plain, expected = trained(tiny_llama, rows, compile="off", **changes)
    assert not plain.step.is_compiled and plain.step.notes == ()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=2e-4, err_msg=name)
    # Padding is told as it was.
    assert run.progress.total.padded_tokens > plain.progress.total.padded_tokens
    assert run.progress.total.trained_tokens == plain.progress.total.trained_tokens


@compiles
def test_compiled_dropout_is_drawn_anew_for_each_micro_batch_as_in_the_plain_step(
    tiny_llama: Path, even_rows: list[TokenRow]
) -> None:
    run, found = trained(tiny_llama, even_rows, dropout=0.4)
    assert run.step.is_compiled
    expected = trained(tiny_llama, even_rows, dropout=0.4, compile="off")[1]
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=2e-4, err_msg=name)
    none = trained(tiny_llama, even_rows)[1]
    other = trained(tiny_llama, even_rows, dropout=0.4, seed=1)[1]
    assert not any(np.allclose(found[name], none[name], atol=1e-3) for name in none)
    assert not any(np.allclose(found[name], other[name], atol=1e-3) for name in other)


@compiles
def test_a_compiled_run_that_was_interrupted_ends_in_the_same_bytes(tiny_llama: Path, rows: list[TokenRow]) -> None:
    _, straight = trained(tiny_llama, rows, dropout=0.3)
    first = trainer(tiny_llama, rows, dropout=0.3)
    for event in first.run():
        if event.step == 3:
            break
    second = trainer(tiny_llama, rows, dropout=0.3)
    second.restore(first.snapshot())
    list(second.run())
    assert all(np.array_equal(straight[name], array) for name, array in weights(second).items())


@compiles
@pytest.mark.parametrize("name", ["gemma2", "qwen3", "mixtral", "phi3_v"])
def test_other_architectures_compile_or_say_why_not(name: str, rows: list[TokenRow], tmp_path: Path) -> None:
    model = adapted(write_model(tmp_path, name))
    loss, gradients = plain_step(model, sum_loss)(model, collate(rows[:3]))
    compiled_loss, compiled = compiled_step(model, fused_sum_loss)(model, collate(rows[:3], few_shapes=True))
    assert compiled_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    found = dict(tree_flatten(compiled))
    for key, array in tree_flatten(gradients):
        largest = float(mx.abs(array).max())
        np.testing.assert_allclose(np.array(found[key]), np.array(array), atol=2e-3 * largest, err_msg=key)


@compiles
def test_training_and_evaluation_are_compiled_apart(tiny_llama: Path, even_rows: list[TokenRow]) -> None:
    model = load_base(tiny_llama)[0]
    adapter.attach(model, config(dropout=0.5), seed=0)
    model.load_weights([(name, mx.ones_like(array)) for name, array in adapter.weights(model).items()], strict=False)
    call, batch = compiled_step(model, sum_loss), collate(even_rows[:2])
    model.eval()
    still = [call(model, batch)[0].item() for _ in range(2)]
    model.train()
    drawn = [call(model, batch)[0].item() for _ in range(2)]
    assert still[0] == still[1]
    assert len({*still, *drawn}) == 3


def test_padding_to_few_shapes_changes_no_loss_and_no_count(tiny_llama: Path, rows: list[TokenRow]) -> None:
    model = adapted(tiny_llama)
    for part in (rows[3:8], rows):
        plain, padded = collate(part), collate(part, few_shapes=True)
        assert len(padded.trained_N) > len(plain.trained_N)
        assert padded.inputs_BxL.shape[1] % 32 == 0
        assert padded.trained_tokens == plain.trained_tokens == padded.weights_N.sum().item()
        assert padded.rows_N.tolist() == plain.rows_N.tolist()
        assert padded.real_tokens == plain.real_tokens
        for form in (sum_loss, fused_sum_loss):
            assert form(model, padded).item() == pytest.approx(form(model, plain).item(), rel=1e-5)


def shapes(rows: Sequence[TokenRow], *, few: bool) -> int:
    batches = [collate(rows[i : i + 4], few_shapes=few) for i in range(0, len(rows), 4)]
    return len({tuple(array.shape for array in batch.arrays.values()) for batch in batches})


def test_few_shapes_are_few() -> None:
    lengths = np.random.default_rng(0).integers(20, 300, 400)
    rows = sorted(
        (token_row(i, int(n), trained=int(n) // 2) for i, n in enumerate(lengths)), key=lambda row: len(row.input_ids)
    )
    assert shapes(rows, few=False) > 95
    assert shapes(rows, few=True) < 40
    batches = [collate(rows[i : i + 4], few_shapes=True) for i in range(0, 400, 4)]
    extra = sum(len(batch.trained_N) for batch in batches) / sum(batch.trained_tokens for batch in batches)
    assert 1 < extra < 1.125


# --- chosen at the start, or not


def test_auto_compiles_on_a_gpu_and_not_on_a_cpu(
    tiny_llama: Path, rows: list[TokenRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    for is_cpu in (True, False):
        monkeypatch.setattr("stages.training.step.on_cpu", lambda is_cpu=is_cpu: is_cpu)
        monkeypatch.setattr("stages.training.step.why_not_compiled", lambda: None)
        run = trainer(tiny_llama, rows, compile="auto")
        assert run.step.is_compiled == (not is_cpu)
        assert run.step.notes == ()


@pytest.mark.skipif(not on_cpu(), reason="a GPU needs no g++")
def test_without_a_compiler_it_is_off_with_a_note(
    tiny_llama: Path, rows: list[TokenRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    run, found = trained(tiny_llama, rows)
    assert not run.step.is_compiled
    assert run.step.notes == ("train.compile is not used: on a CPU MLX compiles with g++, and there is none",)
    expected = trained(tiny_llama, rows, compile="off")[1]
    assert all(np.array_equal(found[name], array) for name, array in expected.items())


def test_a_step_that_cannot_be_traced_is_off_with_a_note(
    tiny_llama: Path, rows: list[TokenRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    def looks_at_values(model: Any, batch: Any, **options: Any) -> mx.array:
        losses = fused_sum_loss(model, batch, **options)
        return losses * (1 if float(losses) < 1e9 else 0)

    monkeypatch.setattr("stages.training.step.fused_sum_loss", looks_at_values)
    monkeypatch.setattr("stages.training.step.why_not_compiled", lambda: None)
    run, _ = trained(tiny_llama, rows)
    assert not run.step.is_compiled
    assert len(run.step.notes) == 1
    assert run.step.notes[0].startswith("train.compile is not used: it fails (")
