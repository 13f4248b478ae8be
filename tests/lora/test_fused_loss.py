"""The fused loss: what the plain one gives, in less memory; and the plain one wherever it would not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from stages.lora import adapter, loss
from stages.lora.batches import Batch, collate
from stages.lora.head import head_is_trained, head_logits
from stages.lora.loss import chunk_scores, fused_sum_loss, sum_loss
from stages.lora.selfcheck import check_batch, compare
from stages.model.load import load_base
from stages.tokens.row import TokenRow
from stages.training.loop import Trainer
from tests.support import adapters
from tests.support.adapters import adapted, config
from tests.support.rows import token_row
from tests.support.runs import make_trainer
from tests.support.tiny import CONFIGS, write_llama, write_model

Gradients = dict[str, np.ndarray]


def step(model: Any, batch: Batch, form: Callable[..., mx.array], **options: Any) -> tuple[float, Gradients]:
    value, tree = nn.value_and_grad(model, lambda m, b: form(m, b, **options))(model, batch)
    return value.item(), {name: np.array(array.astype(mx.float32)) for name, array in tree_flatten(tree)}


def assert_same(found: tuple[float, Gradients], wanted: tuple[float, Gradients], share: float = 1e-4) -> None:
    """Each array agrees to a share of its largest element."""
    assert found[0] == pytest.approx(wanted[0], rel=share)
    assert found[1].keys() == wanted[1].keys()
    for name, array in wanted[1].items():
        largest = float(np.abs(array).max())
        assert largest > 0, name
        np.testing.assert_allclose(found[1][name], array, rtol=0, atol=share * largest, err_msg=name)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_it_is_the_plain_loss_on_every_architecture(name: str, rows: list[TokenRow], tmp_path: Path) -> None:
    model, batch = adapted(write_model(tmp_path, name)), collate(rows[:5])
    assert_same(step(model, batch, fused_sum_loss, chunk_rows=7), step(model, batch, sum_loss))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_it_is_the_plain_loss_on_a_packed_base(name: str, rows: list[TokenRow], tmp_path: Path) -> None:
    folder = write_model(tmp_path, name, quantize=True, dtype="float16")
    model, batch = adapted(folder, dtype="float32", dequantize=False), collate(rows[:5])
    assert any("Quantized" in type(module).__name__ for module in model.modules())
    assert_same(step(model, batch, fused_sum_loss, chunk_rows=7), step(model, batch, sum_loss))


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_it_is_the_plain_loss_in_bfloat16(name: str, rows: list[TokenRow], tmp_path: Path) -> None:
    model, batch = adapted(write_model(tmp_path, name, dtype="bfloat16"), dtype="bfloat16"), collate(rows[:5])
    assert model(mx.array([[1]])).dtype == mx.bfloat16
    assert_same(step(model, batch, fused_sum_loss, chunk_rows=7), step(model, batch, sum_loss), share=3e-2)


@pytest.mark.parametrize("chunk_rows", [1, 19, 20, 21, 1000])
def test_chunks_may_end_anywhere(tiny_llama: Path, rows: list[TokenRow], chunk_rows: int) -> None:
    model, batch = adapted(tiny_llama), collate(rows[:5])
    assert batch.trained_tokens == 20
    assert_same(step(model, batch, fused_sum_loss, chunk_rows=chunk_rows), step(model, batch, sum_loss))


def test_whatever_comes_back_scales_the_gradients(tiny_llama: Path, rows: list[TokenRow]) -> None:
    model, batch = adapted(tiny_llama), collate(rows[:5])

    def scaled(form: Callable[..., mx.array]) -> Callable[..., mx.array]:
        return lambda model, batch: -3.5 * form(model, batch)

    assert_same(step(model, batch, scaled(fused_sum_loss)), step(model, batch, scaled(sum_loss)))


def test_one_exp_and_two_products_a_chunk(tiny_llama: Path, tmp_path: Path) -> None:
    model = adapted(tiny_llama)
    hidden, targets = mx.random.normal((6, 32)), mx.array([1, 2, 3, 4, 5, 6])

    def fused(hidden: mx.array) -> mx.array:
        def losses(hidden: mx.array, targets_n: mx.array) -> Any:
            return loss._cross_entropy(head_logits(model, hidden), targets_n)[0]

        return loss._fused_losses(losses, hidden, targets, 6).sum()

    mx.export_to_dot(str(tmp_path / "graph.dot"), *mx.value_and_grad(fused)(hidden))
    graph = (tmp_path / "graph.dot").read_text()
    assert graph.count('"Exp"') == 1
    assert graph.count('"Matmul"') == 3  # with the head, forward and back, and the sum of the exps


def test_the_gradient_at_the_logits_is_softmax_less_one_hot() -> None:
    logits, targets = mx.random.normal((5, 9), key=mx.random.key(0)) * 30, mx.array([0, 8, 3, 3, 1])
    losses, gradient = loss.cross_entropy_with_gradient(logits, targets)
    softmax = mx.softmax(logits, axis=-1)
    np.testing.assert_allclose(np.array(losses), np.array(nn.losses.cross_entropy(logits, targets)), rtol=1e-5)
    np.testing.assert_allclose(np.array(gradient), np.array(softmax) - np.eye(9)[np.array(targets)], atol=1e-6)


def wide(tmp_path: Path) -> tuple[Any, Batch]:
    """A model whose logits for this batch, 56 MB, outweigh everything else."""
    rows = [token_row(i, 120, trained=118) for i in range(6)]
    return adapted(write_llama(tmp_path, vocab_size=20_000), ["q_proj"]), collate(rows)


def peak(run: Callable[[], object]) -> int:
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(run())
    return mx.get_peak_memory() - before


def test_peak_memory_is_that_of_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = wide(tmp_path)
    monkeypatch.setattr(loss, "_CHUNK_BYTES", 2**20)
    monkeypatch.setattr(loss, "_CHUNK_ROWS", 1)
    plain = peak(lambda: nn.value_and_grad(model, sum_loss)(model, batch))
    fused = peak(lambda: nn.value_and_grad(model, fused_sum_loss)(model, batch))
    logits = batch.trained_tokens * 20_000 * 4
    assert plain > 3 * logits
    assert fused < logits / 2


def test_scores_take_the_memory_of_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = wide(tmp_path)
    monkeypatch.setattr(loss, "_CHUNK_BYTES", 2**20)
    monkeypatch.setattr(loss, "_CHUNK_ROWS", 1)
    parts: list[np.ndarray] = []

    def score() -> None:
        for losses, correct in chunk_scores(model, batch):
            mx.eval(losses, correct)
            parts.append(np.array(losses))

    assert peak(score) < batch.trained_tokens * 20_000 * 4 / 2
    assert len(parts) > 40
    np.testing.assert_allclose(np.concatenate(parts), np.array(loss.token_losses(model, batch)), rtol=1e-5)


# --- chosen at the start, or not


def trainer(model: Any, rows: list[TokenRow], **changes: Any) -> Trainer:
    options: dict[str, Any] = {"iters": 3, "batch_size": 4, "learning_rate": 1e-2, "seed": 0}
    return make_trainer(model, rows, rows[:4], **(options | changes))


def fresh(folder: Path, *, dropout: float = 0.0, **options: Any) -> Any:
    model = load_base(folder, **options)[0]
    adapter.attach(model, config(dropout=dropout), seed=0)
    return model


def run(model: Any, rows: list[TokenRow], **changes: Any) -> tuple[Trainer, Gradients]:
    made = trainer(model, rows, **changes)
    list(made.run())
    return made, {name: np.array(array) for name, array in adapter.weights(model).items()}


@pytest.mark.parametrize(
    "changes", [{}, {"grad_checkpoint": True}, {"grad_accumulation": 2, "batch_size": 2}, {"dropout": 0.3}]
)
def test_training_with_it_ends_in_the_plain_weights(
    tiny_llama: Path, rows: list[TokenRow], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(loss, "_CHUNK_ROWS", 9)
    dropout = changes.pop("dropout", 0.0)
    found, weights = run(fresh(tiny_llama, dropout=dropout), rows, **changes)
    assert found.step.is_fused and found.step.notes == ()
    plain, expected = run(fresh(tiny_llama, dropout=dropout), rows, fused_loss=False, **changes)
    assert not plain.step.is_fused and plain.step.notes == ()
    for name, array in expected.items():
        np.testing.assert_allclose(weights[name], array, atol=2e-4, err_msg=name)


def test_the_check_leaves_no_trace_in_the_run(tiny_llama: Path, rows: list[TokenRow]) -> None:
    model = fresh(tiny_llama, dropout=0.3)
    before = {name: np.array(array) for name, array in adapter.weights(model).items()}
    mx.random.seed(7)
    trainer(model, rows)
    drawn = mx.random.uniform(shape=(3,)).tolist()
    mx.random.seed(7)
    assert drawn == mx.random.uniform(shape=(3,)).tolist()
    assert all(np.array_equal(before[name], array) for name, array in adapter.weights(model).items())


@pytest.mark.parametrize(
    ("name", "targets"), [("llama", ["embed_tokens"]), ("qwen3", ["lm_head"]), ("gemma2", ["q_proj", "embed_tokens"])]
)
def test_a_head_that_is_trained_keeps_the_plain_loss(
    name: str, targets: list[str], rows: list[TokenRow], tmp_path: Path
) -> None:
    model = load_base(write_model(tmp_path, name))[0]
    adapter.attach(model, adapters.configure(model, targets=targets), seed=0)
    found = trainer(model, rows)
    assert not found.step.is_fused
    assert found.step.notes == ("train.fused_loss is not used: the head itself is trained",)


def test_an_embedding_that_is_not_the_head_may_be_trained(rows: list[TokenRow], tmp_path: Path) -> None:
    model, batch = adapted(write_model(tmp_path, "phi3"), ["embed_tokens", "qkv_proj"]), collate(rows[:5])
    assert not head_is_trained(model)
    assert_same(step(model, batch, fused_sum_loss, chunk_rows=7), step(model, batch, sum_loss))


def test_a_head_that_cannot_be_run_by_itself_keeps_the_plain_loss(model: Any, rows: list[TokenRow]) -> None:
    class Mixes(nn.Module):
        """Its head looks at the positions before as well."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model.model

        @property
        def layers(self) -> Any:
            return self.model.layers

        def __call__(self, tokens: mx.array) -> mx.array:
            hidden = self.model(tokens)
            return self.model.embed_tokens.as_linear(hidden + mx.cumsum(hidden, axis=1))

    mixes = Mixes()
    mixes.freeze()
    adapter.attach(mixes, config(), seed=0)
    found, _ = run(mixes, rows)
    assert found.step.notes == ("train.fused_loss is not used: this model's head cannot be run apart from its layers",)
    assert found.progress.step == 3


def test_a_fused_loss_that_is_wrong_is_not_used(
    tiny_llama: Path, rows: list[TokenRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = loss.cross_entropy_with_gradient

    def slightly_off(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        losses, gradient = right(logits, targets)
        return losses, 1.01 * gradient

    monkeypatch.setattr(loss, "_cross_entropy", loss._with_gradient_kept(slightly_off))
    found = trainer(fresh(tiny_llama), rows)
    assert not found.step.is_fused
    assert found.step.notes == ("train.fused_loss is not used: 1.00% off in the gradient",)


@pytest.mark.parametrize(
    ("fast", "reason"),
    [
        (lambda model, batch: sum_loss(model, batch) * 1.01, "1.00% off in the loss"),
        (lambda model, batch: sum_loss(model, batch) * float("nan"), "nan% off in the loss"),
        (lambda model, batch: mx.stop_gradient(sum_loss(model, batch)), "100.00% off in the gradient"),
        (lambda model, batch: model.nothing, "it fails (AttributeError"),
    ],
)
def test_a_disagreement_is_one_line(tiny_llama: Path, rows: list[TokenRow], fast: Any, reason: str) -> None:
    model, batch = adapted(tiny_llama), collate(rows[:2])

    def results(form: Any) -> dict[str, Any]:
        return dict(zip(("loss", "gradient"), nn.value_and_grad(model, form)(model, batch), strict=True))

    plain, other = partial(results, sum_loss), partial(results, fast)
    found = compare(model, "this", plain, other).note
    assert found is not None and found.startswith(f"this is not used: {reason}") and "\n" not in found
    assert compare(model, "this", plain, plain).passed


def test_the_check_looks_at_the_last_trained_tokens_of_two_rows() -> None:
    long, short = token_row(0, 300, trained=5), token_row(1, 20, trained=3)
    long.loss_mask[:] = False
    long.loss_mask[150:160] = True
    batch = check_batch([long, short, short])
    assert batch.inputs_BxL.shape == (2, 31)
    assert batch.inputs_BxL[0].tolist() == long.input_ids[128:159].tolist()
    assert batch.targets_N.tolist() == [*long.input_ids[156:160].tolist(), *short.input_ids[-3:].tolist()]
