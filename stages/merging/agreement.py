"""What is left of an adapter in a merged model: the predictions of base, adapter and merged model compared.

The measure is the Kullback-Leibler divergence of next-token distributions at trained positions. The adapter's effect is
its divergence from the base, and what was lost the merged model's from the adapter; `survival` is one minus their
ratio. Divergences grow with the square of a small change: half of the update lost leaves a survival of three quarters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.nn as nn
import numpy as np

from stages.lora.batches import Batch
from stages.lora.loss import trained_logits

# Nats a token below which no text and no metric can tell two models apart: 0.01 % of the perplexity.
NEGLIGIBLE = 1e-4


@dataclass(frozen=True)
class Agreement:
    """The distances of three models over some tokens; losses and divergences in nats a token."""

    tokens: int
    base_loss: float
    adapter_loss: float
    merged_loss: float
    effect: float  # mean KL(adapter ‖ base)
    mean_divergence: float  # mean KL(adapter ‖ merged)
    max_divergence: float
    same_choice: float  # share of tokens whose likeliest prediction adapter and merged model share

    @property
    def survival(self) -> float:
        """The share of the adapter's effect that is left, 1 where there was none to lose; negative if all is worse."""
        return 1 - self.mean_divergence / self.effect if self.effect else float(self.mean_divergence <= NEGLIGIBLE)

    def is_kept(self, min_survival: float) -> bool:
        """True if enough of the adapter survives, or if what is lost is too little to matter."""
        return self.survival >= min_survival or self.mean_divergence <= NEGLIGIBLE


def log_probabilities(model: nn.Module, batches: Sequence[Batch]) -> list[np.ndarray]:
    """Log-probabilities at each batch's trained positions, float32 (N, V), by a model in evaluation mode."""
    result = []
    for batch in batches:
        x_NxV = np.array(trained_logits(model, batch))
        x_NxV -= x_NxV.max(axis=-1, keepdims=True)
        x_NxV -= np.log(np.exp(x_NxV).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
        result.append(x_NxV)
    return result


def compare(
    batches: Sequence[Batch],
    *,
    base: Sequence[np.ndarray],
    adapter: Sequence[np.ndarray],
    merged: Sequence[np.ndarray],
) -> Agreement:
    """Compare what `log_probabilities` gave for the three models on the same batches."""
    targets = [np.array(batch.targets_N) for batch in batches]
    lost, effect = divergences(adapter, merged), divergences(adapter, base)
    same = [p_NxV.argmax(axis=-1) == q_NxV.argmax(axis=-1) for p_NxV, q_NxV in zip(adapter, merged, strict=True)]
    return Agreement(
        tokens=len(lost),
        base_loss=_loss(base, targets),
        adapter_loss=_loss(adapter, targets),
        merged_loss=_loss(merged, targets),
        effect=float(effect.mean()),
        mean_divergence=float(lost.mean()),
        max_divergence=float(lost.max()),
        same_choice=float(np.concatenate(same).mean()),
    )


def _loss(log_p: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> float:
    of_targets = [p_NxV[np.arange(len(ids_N)), ids_N] for p_NxV, ids_N in zip(log_p, targets, strict=True)]
    return -float(np.concatenate(of_targets).mean(dtype=np.float64))


def divergences(reference: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> np.ndarray:
    """KL(reference ‖ other) of each token, float64 (tokens,)."""
    found = [
        (np.exp(p_NxV) * (p_NxV - q_NxV)).sum(axis=-1, dtype=np.float64)
        for p_NxV, q_NxV in zip(reference, other, strict=True)
    ]
    # Rounding can push a divergence of nothing a hair below zero.
    return np.maximum(np.concatenate(found), 0.0)
