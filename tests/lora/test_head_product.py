"""A head that is one product, a part of the vocabulary at a time: the losses, gradients and answers of whole logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRAEmbedding

from stages.lora import adapter
from stages.lora.batches import collate
from stages.lora.execution import narrow_head, patch, patches_of, use_kernels
from stages.lora.head import head_matrix
from stages.lora.head_product import head_losses, part_length
from stages.lora.loss import chunk_scores, cross_entropy_with_gradient, fused_sum_loss, sum_loss
from stages.lora.selfcheck import relative_difference
from stages.model.load import load_base, on_cpu
from stages.tokens.row import TokenRow
from tests.support.adapters import config, fill
from tests.support.rows import token_row

pytestmark = pytest.mark.skipif(not on_cpu(), reason="the kernels are for CPUs")


def arrays(positions: int = 7, vocabulary: int = 101, width: int = 16) -> tuple[mx.array, mx.array, mx.array]:
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((positions, width)), rng.standard_normal((vocabulary, width))
    targets = rng.integers(0, vocabulary, positions)
    return mx.array(hidden.astype(np.float32)), mx.array(head.astype(np.float32)), mx.array(targets.astype(np.int32))


@pytest.mark.parametrize("columns", [1, 50, 100, 101, 1000])
def test_parts_may_end_anywhere(columns: int) -> None:
    hidden, head, targets = arrays()
    found = head_losses(hidden, head, targets, gradient=True, columns=columns)
    losses, slope = cross_entropy_with_gradient(hidden @ head.T, targets)
    np.testing.assert_allclose(found.losses_N, losses, rtol=1e-5, atol=1e-5)
    assert found.gradient_NxD is not None
    np.testing.assert_allclose(found.gradient_NxD, slope @ head, rtol=1e-4, atol=1e-5)
    assert found.likeliest_N.tolist() == mx.argmax(hidden @ head.T, axis=-1).tolist()


@pytest.mark.parametrize("order", [1, -1])
def test_logits_that_would_overflow_do_not(order: int) -> None:
    """Whether the largest logit comes in the first part or in the last."""
    hidden, head = mx.ones((1, 1)), mx.array([[200.0], [0.0], [-200.0]][::order])
    found = head_losses(hidden, head, mx.array([1]), gradient=True, columns=1)
    assert found.losses_N.tolist() == [200.0]
    assert found.gradient_NxD is not None and found.gradient_NxD.tolist() == [[200.0]]


def test_the_loss_of_a_token_that_is_almost_sure_is_not_rounded_away() -> None:
    rng = np.random.default_rng(1)
    head = rng.standard_normal((3000, 64)).astype(np.float32)
    hidden = (0.4 * head[:5]).astype(np.float32)
    exact = hidden.astype(np.float64) @ head.T.astype(np.float64)
    exact -= exact[np.arange(5), np.arange(5), None]
    found = head_losses(mx.array(hidden), mx.array(head), mx.arange(5), gradient=False, columns=700).losses_N
    wanted = np.log1p(np.exp(exact).sum(axis=-1) - 1)
    assert wanted.max() < 0.01 and np.array(found).min() >= 0
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-7)


def test_a_part_is_a_few_megabytes_whatever_the_vocabulary() -> None:
    assert part_length(80) * 80 * 4 <= 8 * 2**20
    assert part_length(1) >= part_length(10**6) >= 1


def test_loss_and_gradients_are_those_of_the_plain_model(model: Any, rows: list[TokenRow]) -> None:
    adapter.attach(model, config(), seed=0)
    fill(model)
    batch = collate(rows)
    loss, gradient = nn.value_and_grad(model, sum_loss)(model, batch)
    assert use_kernels(model, rows).passed
    assert narrow_head(model).passed
    assert head_matrix(model) is not None
    found, found_gradient = nn.value_and_grad(model, lambda m, b: fused_sum_loss(m, b, columns=9))(model, batch)
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    assert relative_difference(dict(tree_flatten(found_gradient)), dict(tree_flatten(gradient))) < 1e-4


def test_scores_are_those_of_whole_logits(model: Any, rows: list[TokenRow]) -> None:
    batch = collate(rows)
    wanted = [
        np.concatenate([np.array(part) for part in parts]) for parts in zip(*chunk_scores(model, batch), strict=True)
    ]
    use_kernels(model, rows)
    narrow_head(model)
    assert head_matrix(model) is not None
    found = [
        np.concatenate([np.array(part) for part in parts]) for parts in zip(*chunk_scores(model, batch), strict=True)
    ]
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-4)
    assert found[1].tolist() == wanted[1].tolist()


@pytest.mark.parametrize("change", [lambda x: mx.tanh(x / 30) * 30, lambda x: x * 0.5, lambda x: x + 1])
def test_a_head_that_does_more_is_no_product(model: Any, rows: list[TokenRow], change: Any) -> None:
    plain = type(model)

    class DoesMore(plain):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **options: Any) -> Any:
            return change(plain.__call__(self, *args, **options))

    model.__class__ = DoesMore
    assert use_kernels(model, rows).passed
    assert narrow_head(model).passed
    assert head_matrix(model) is None


def test_an_adapted_head_is_no_product(model: Any) -> None:
    use_kernels(model, [token_row(0, 9, trained=3), token_row(1, 9, trained=3)])
    narrow_head(model)
    table = model.model.embed_tokens
    assert head_matrix(model) is not None
    model.lm_head = nn.Linear(table.weight.shape[1], table.weight.shape[0], bias=True)
    assert head_matrix(model) is None


def test_an_adapter_that_comes_after_the_check_leaves_no_other_table_in_its_place(model: Any) -> None:
    use_kernels(model, [token_row(0, 9, trained=3), token_row(1, 9, trained=3)])
    narrow_head(model)
    table = model.model.embed_tokens
    model.model.positions = nn.Embedding(7, table.weight.shape[1])
    model.model.embed_tokens = LoRAEmbedding.from_base(table)
    assert head_matrix(model) is None


def test_a_model_patched_like_another_has_its_product(tiny_llama: Path, rows: list[TokenRow]) -> None:
    first, second = (load_base(tiny_llama)[0] for _ in range(2))
    use_kernels(first, rows)
    narrow_head(first)
    patch(second, patches_of(first))
    found, wanted = head_matrix(second), head_matrix(first)
    assert found is not None and wanted is not None and mx.array_equal(found, wanted).item()
