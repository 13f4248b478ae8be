"""The loss: over trained tokens and nothing else, however the rows are batched or padded."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from stages.lora import adapter
from stages.lora.batches import collate
from stages.lora.execution import narrow_head
from stages.lora.head import is_narrowed
from stages.lora.loss import sum_loss, token_losses, trained_logits
from stages.scoring.score import score_rows
from stages.tokens.row import TokenRow
from tests.support.adapters import config, fill
from tests.support.rows import token_row


def reference_loss(model: Any, rows: list[TokenRow]) -> float:
    """The mean by the book: each row alone, in double precision."""
    losses = []
    for row in rows:
        logits = np.array(model(mx.array(row.input_ids[None, :-1].astype(np.int32))))[0].astype(np.float64)
        log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        nll = log_z - logits[np.arange(len(logits)), row.input_ids[1:]]
        losses += nll[row.loss_mask[1:]].tolist()
    return float(np.mean(losses))


def test_the_loss_is_the_mean_over_trained_tokens(model: Any, rows: list[TokenRow]) -> None:
    batch = collate(rows)
    mean = sum_loss(model, batch).item() / batch.trained_tokens
    assert mean == pytest.approx(reference_loss(model, rows), abs=1e-5)


def test_narrowing_the_head_changes_neither_loss_nor_gradients(model: Any, rows: list[TokenRow]) -> None:
    adapter.attach(model, config(), seed=0)
    fill(model)
    step = nn.value_and_grad(model, sum_loss)
    batch = collate(rows)
    plain_loss, plain = step(model, batch)
    assert narrow_head(model).passed
    narrow_loss, narrow = step(model, batch)
    assert narrow_loss.item() == pytest.approx(plain_loss.item(), rel=1e-6)
    gradients = dict(tree_flatten(narrow))
    assert len(gradients) == 8
    for name, gradient in tree_flatten(plain):
        np.testing.assert_allclose(np.array(gradients[name]), np.array(gradient), rtol=1e-4, atol=1e-7)


def test_a_narrowed_model_still_answers_with_all_positions(model: Any) -> None:
    tokens = mx.array([[1, 2, 3]])
    before = model(tokens)
    narrow_head(model)
    assert mx.array_equal(model(tokens), before).item()


def test_a_model_without_the_usual_norm_is_left_alone(model: Any, rows: list[TokenRow]) -> None:
    class Unusual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = model

        def __call__(self, tokens: mx.array) -> mx.array:
            return self.decoder(tokens)

    unusual = Unusual()
    assert not narrow_head(unusual).passed
    assert mx.array_equal(trained_logits(unusual, collate(rows)), trained_logits(model, collate(rows))).item()


def test_a_model_that_does_more_after_its_norm_is_left_alone(model: Any) -> None:
    class Mixes(nn.Module):
        """Its head looks at the positions before as well."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model.model

        def __call__(self, tokens: mx.array) -> mx.array:
            hidden = self.model(tokens)
            return self.model.embed_tokens.as_linear(hidden + mx.cumsum(hidden, axis=1))

    mixes = Mixes()
    assert not narrow_head(mixes).passed
    assert not is_narrowed(mixes)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(lengths=st.lists(st.integers(4, 40), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_padding_changes_no_row(model: Any, lengths: list[int], seed: int) -> None:
    rows = [token_row(i, length, trained=2, seed=seed) for i, length in enumerate(lengths)]
    together = np.array(token_losses(model, collate(rows)))
    alone = np.concatenate([np.array(token_losses(model, collate([row]))) for row in rows])
    np.testing.assert_allclose(together, alone, atol=2e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_scores_of_rows_do_not_depend_on_the_batch(model: Any, rows: list[TokenRow], batch_size: int) -> None:
    scores = dict(score_rows(model, rows, batch_size=batch_size))
    assert sorted(scores) == list(range(len(rows)))
    total = sum((scores[i] for i in range(1, len(rows))), scores[0])
    assert total.tokens == sum(int(row.loss_mask.sum()) for row in rows)
    assert total.loss == pytest.approx(reference_loss(model, rows), abs=1e-5)
    assert total.bits_per_byte == pytest.approx(total.loss_sum / np.log(2) / sum(row.trained_bytes for row in rows))
    assert total.perplexity == pytest.approx(np.exp(total.loss))


def test_token_accuracy_counts_the_likeliest_token(model: Any) -> None:
    row = token_row(0, 12, trained=4)
    likeliest = np.array(trained_logits(model, collate([row]))).argmax(-1)
    row.input_ids[-4:] = likeliest
    # Each change moves the next position's prediction: repeat until all four agree.
    for _ in range(8):
        row.input_ids[-4:] = np.array(trained_logits(model, collate([row]))).argmax(-1)
    ((_, score),) = score_rows(model, [row], batch_size=1)
    assert score.correct == 4
    assert score.token_accuracy == 1.0
