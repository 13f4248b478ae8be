"""The loss: next-token cross-entropy over trained positions only.

The head is the widest matrix of a model, and its logits the largest array of a step. So the head sees the trained
positions and no others, and in the fused form a chunk of them at a time: logits, losses and the loss's gradient by the
hidden states are formed in one pass, with one exp a logit and two products with the head, and no chunk's logits
outlive it. On a CPU a head that is one product is taken by parts of the vocabulary instead (head_product.py).
Source: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training" (arXiv 2410.10989), section 3.2; Wijmans
et al., "Cut Your Losses in Large-Vocabulary Language Models" (arXiv 2411.09009).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from stages.lora import kernels
from stages.lora.batches import Batch
from stages.lora.frozen import fed
from stages.lora.head import head_is_trained, head_logits, head_matrix, hidden_at, is_narrowed, logits_at
from stages.lora.head_product import head_losses

Loss = Callable[[nn.Module, Batch], mx.array]
Pair = tuple[mx.array, mx.array]

# Logits in float32 that are formed together, few beside the weights; but with fewer rows than this, reading the head's
# weights would take longer than multiplying by them.
_CHUNK_BYTES, _CHUNK_ROWS = 16 * 2**20, 64


def trained_logits(model: nn.Module, batch: Batch) -> mx.array:
    """The model's logits in float32 at the trained positions, (N, V)."""
    with fed(model, batch.states):
        return logits_at(model, batch.inputs_BxL, batch.trained_N).astype(mx.float32)


def token_losses(model: nn.Module, batch: Batch) -> mx.array:
    """Negative log-likelihood in nats of each trained token, (N,)."""
    return nn.losses.cross_entropy(trained_logits(model, batch), batch.targets_N)


def sum_loss(model: nn.Module, batch: Batch) -> mx.array:
    """Sum over the batch's trained tokens; padding and untrained tokens do not enter."""
    return (token_losses(model, batch) * batch.weights_N).sum()


def fused_sum_loss(
    model: nn.Module, batch: Batch, *, chunk_rows: int | None = None, columns: int | None = None
) -> mx.array:
    """The same of a narrowed model in the fused form; no gradient reaches weights of the head itself.

    `chunk_rows` trained positions at a time, or `columns` of the vocabulary where the head is taken by parts.
    """
    with fed(model, batch.states):
        hidden_NxD = hidden_at(model, batch.inputs_BxL, batch.trained_N)
    if (matrix_VxD := head_matrix(model)) is not None:
        by_parts = partial(_by_parts, head_VxD=matrix_VxD, columns=columns)
        return (_with_gradient(by_parts, hidden_NxD, batch.targets_N) * batch.weights_N).sum()
    rows = chunk_rows or chunk_length(_vocabulary(model, hidden_NxD))
    is_eager = kernels.in_use(model)
    cross_entropy = _cross_entropy_on_cpu if is_eager else _cross_entropy

    def losses(hidden_nxD: mx.array, targets_n: mx.array) -> mx.array:
        losses_n, _ = cast(Pair, cross_entropy(head_logits(model, hidden_nxD).astype(mx.float32), targets_n))
        return losses_n

    losses_N = _fused_losses(losses, hidden_NxD, batch.targets_N, rows, is_eager=is_eager)
    return (losses_N * batch.weights_N).sum()


def chunk_length(vocabulary: int) -> int:
    """Trained positions whose logits are formed together."""
    return max(_CHUNK_BYTES // (4 * vocabulary), _CHUNK_ROWS)


def why_not_fused(model: nn.Module) -> str | None:
    """The reason why a model cannot have the fused form, if there is one."""
    if not is_narrowed(model):
        return "this model's head cannot be run apart from its layers"
    return "the head itself is trained" if head_is_trained(model) else None


def chunk_scores(model: nn.Module, batch: Batch) -> Iterator[Pair]:
    """Loss of each trained token and whether it was the likeliest, (n,) each, a chunk at a time in their order.

    Evaluate one before the next is asked for, and no more than a chunk's logits are in memory.
    """
    if (matrix_VxD := head_matrix(model)) is not None:
        with fed(model, batch.states):
            hidden_NxD = hidden_at(model, batch.inputs_BxL, batch.trained_N)
        found = head_losses(hidden_NxD, matrix_VxD, batch.targets_N, gradient=False)
        yield found.losses_N, found.likeliest_N == batch.targets_N
        return
    for logits_nxV, targets_n in _logit_chunks(model, batch):
        if kernels.in_use(model):
            yield kernels.cross_entropy(logits_nxV, targets_n)
            continue
        losses_n, _ = cross_entropy_with_gradient(logits_nxV, targets_n)
        yield losses_n, mx.argmax(logits_nxV, axis=-1) == targets_n


def cross_entropy_with_gradient(logits_NxV: mx.array, targets_N: mx.array) -> Pair:
    """Losses in nats, (N,), and the gradient of their sum by the logits, softmax less one-hot (N, V); float32."""
    targets_Nx1 = targets_N[:, None]
    top_Nx1 = logits_NxV.max(axis=-1, keepdims=True)
    exp_NxV = mx.exp(logits_NxV - top_Nx1)
    # As a product, for a processor's `sum` adds up one by one: over 49,152 terms that is off by up to 1e-4.
    sum_Nx1 = exp_NxV @ mx.ones((exp_NxV.shape[-1], 1))
    losses_Nx1 = mx.log(sum_Nx1) + top_Nx1 - mx.take_along_axis(logits_NxV, targets_Nx1, axis=-1)
    softmax_NxV = exp_NxV / sum_Nx1
    at_target_Nx1 = mx.take_along_axis(softmax_NxV, targets_Nx1, axis=-1)
    return losses_Nx1[:, 0], mx.put_along_axis(softmax_NxV, targets_Nx1, at_target_Nx1 - 1, axis=-1)


def _with_gradient_kept(function: Callable[[mx.array, mx.array], Pair]) -> Any:
    """Losses and their gradient as a function to be differentiated without computing either again."""

    @mx.custom_function
    def pair(logits_NxV: mx.array, targets_N: mx.array) -> Pair:
        return function(logits_NxV, targets_N)

    @pair.vjp
    def vjp(primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]) -> Pair:
        # For the sum of the losses alone, each of whose cotangents is 1: the gradient is there already.
        return outputs[1], mx.zeros_like(primals[1])

    return pair


_cross_entropy = _with_gradient_kept(cross_entropy_with_gradient)
_cross_entropy_on_cpu = _with_gradient_kept(kernels.cross_entropy_with_gradient)


def _fused_losses(
    losses_of: Callable[..., mx.array],
    hidden_NxD: mx.array,
    targets_N: mx.array,
    chunk_rows: int,
    *,
    is_eager: bool = False,
) -> mx.array:
    """Losses (N,), their gradient by the hidden states formed with them; `is_eager` where `losses_of` evaluates."""

    def in_chunks(hidden_NxD: mx.array, targets_N: mx.array) -> Pair:
        losses: list[mx.array] = []
        gradients: list[mx.array] = []
        for start in range(0, len(hidden_NxD), chunk_rows):
            hidden_nxD, targets_n = (array[start : start + chunk_rows] for array in (hidden_NxD, targets_N))
            if losses:
                # One chunk after the other: MLX would order independent ones by breadth, all logits alive at once.
                hidden_nxD = mx.depends(hidden_nxD, [losses[-1], gradients[-1]])
            ones_n, of_targets = mx.ones(targets_n.shape), partial(losses_of, targets_n=targets_n)
            (losses_n,), (gradient_nxD,) = mx.vjp(of_targets, [hidden_nxD], [ones_n])
            if is_eager:  # lets go of the chunk's logits
                losses_n, gradient_nxD = kernels.detached(losses_n), kernels.detached(gradient_nxD)
            losses.append(losses_n)
            gradients.append(gradient_nxD)
        return mx.concatenate(losses), mx.concatenate(gradients)

    return _with_gradient(in_chunks, hidden_NxD, targets_N)


def _by_parts(hidden_NxD: mx.array, targets_N: mx.array, *, head_VxD: mx.array, columns: int | None) -> Pair:
    """Losses (N,) and their gradient by the hidden states (N, D), of a head that is a product."""
    found = head_losses(hidden_NxD, head_VxD, targets_N, gradient=True, columns=columns)
    return found.losses_N, cast(mx.array, found.gradient_NxD)


def _with_gradient(both: Callable[..., Pair], hidden_NxD: mx.array, targets_N: mx.array) -> mx.array:
    """Losses (N,) of a function that gives their gradient by the hidden states with them."""

    @mx.custom_function
    def losses_and_gradient(hidden_NxD: mx.array, targets_N: mx.array) -> Pair:
        return both(hidden_NxD, targets_N)

    @losses_and_gradient.vjp
    def vjp(primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]) -> Pair:
        # A token's loss depends on its own hidden state only.
        gradient_NxD = cotangents[0][:, None] * outputs[1]
        return gradient_NxD.astype(primals[0].dtype), mx.zeros_like(primals[1])

    losses_N, _ = cast(Pair, losses_and_gradient(hidden_NxD, targets_N))
    return losses_N


def _logit_chunks(model: nn.Module, batch: Batch) -> Iterator[Pair]:
    """Logits in float32 and targets of trained positions, (n, V) and (n,); all at once if the head is not apart."""
    if not is_narrowed(model):
        yield trained_logits(model, batch), batch.targets_N
        return
    with fed(model, batch.states):
        hidden_NxD = hidden_at(model, batch.inputs_BxL, batch.trained_N)
    mx.eval(hidden_NxD)
    rows = chunk_length(_vocabulary(model, hidden_NxD))
    for start in range(0, len(hidden_NxD), rows):
        chunk = slice(start, start + rows)
        yield head_logits(model, hidden_NxD[chunk]).astype(mx.float32), batch.targets_N[chunk]


def _vocabulary(model: nn.Module, hidden_NxD: mx.array) -> int:
    return head_logits(model, hidden_NxD[:1]).shape[-1]  # of a graph that is not evaluated
