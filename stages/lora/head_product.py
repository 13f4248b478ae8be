"""Losses of a head that is one matrix product, the vocabulary a part at a time, on a CPU.

The logits of a part live in a few megabytes, whatever the vocabulary: each part's rows of the head are multiplied by
twice, while they are in the processor's cache, and the sums over the vocabulary are carried along, scaled down whenever
a larger logit turns up. Source: Milakov and Gimelshein, "Online normalizer calculation for softmax"
(arXiv 1805.02867); Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (arXiv 2411.09009).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from stages.lora import kernels

# Logits of a part: few megabytes, and enough for two threads. But not fewer rows of the head than a product needs.
_PART, _COLUMNS = 2 * 2**20, 1024


@dataclass(frozen=True)
class HeadLosses:
    """Losses in nats and the likeliest tokens, (N,); the gradient of the losses' sum by the hidden states, (N, D)."""

    losses_N: mx.array
    likeliest_N: mx.array
    gradient_NxD: mx.array | None


def part_length(positions: int) -> int:
    """Tokens of the vocabulary whose logits are formed together."""
    return max(_PART // max(positions, 1), _COLUMNS)


def head_losses(
    hidden_NxD: mx.array, head_VxD: mx.array, targets_N: mx.array, *, gradient: bool, columns: int | None = None
) -> HeadLosses:
    """The cross-entropy of logits hidden @ head.T, in float32; `columns` of the vocabulary at a time."""
    hidden_NxD = kernels.detached(hidden_NxD)
    positions, columns = len(hidden_NxD), columns or part_length(len(hidden_NxD))
    top_N, total_N = np.full(positions, -np.inf, np.float32), np.zeros(positions, np.float32)
    likeliest_N, at_target_N = np.zeros(positions, np.int32), np.zeros(positions, np.float32)
    mean_NxD = np.zeros(hidden_NxD.shape, np.float32)  # of the head's rows, weighted by exp(logit - top)
    for first in range(0, len(head_VxD), columns):
        head_vxD = head_VxD[first : first + columns]
        logits_Nxv = hidden_NxD @ head_vxD.T
        shrink_N = np.empty(positions, np.float32)
        kernels.each(
            _take_in(first),
            *(kernels.view(logits_Nxv), kernels.view(targets_N), top_N, total_N, likeliest_N, at_target_N, shrink_N),
        )
        if gradient:
            mean_NxD *= shrink_N[:, None]
            mean_NxD += kernels.view(logits_Nxv @ head_vxD)
    losses_N = np.log(total_N) - (at_target_N - top_N)
    if gradient:
        mean_NxD /= total_N[:, None]
        mean_NxD -= kernels.view(head_VxD[targets_N])
    return HeadLosses(mx.array(losses_N), mx.array(likeliest_N), mx.array(mean_NxD) if gradient else None)


def _take_in(first: int) -> Any:
    """The kernel of a part that begins at token `first`: its logits become exp(logit - top)."""

    def kernel(logits: Any, targets: Any, top: Any, total: Any, likeliest: Any, at_target: Any, shrink: Any) -> None:
        rows, best = np.arange(len(logits)), logits.argmax(axis=-1)
        here = logits[rows, best]
        # Of the same product as all others: where it is the largest, the loss is what is left of their sum.
        column = targets.astype(np.int64) - first
        is_here = (column >= 0) & (column < logits.shape[-1])
        at_target[is_here] = logits[rows[is_here], column[is_here]]
        np.copyto(likeliest, first + best, where=here > top, casting="same_kind")
        higher = np.maximum(top, here)
        np.exp(top - higher, out=shrink)
        logits -= higher[:, None]
        np.exp(logits, out=logits)
        total *= shrink
        total += logits.sum(axis=-1)
        top[:] = higher

    return kernel
