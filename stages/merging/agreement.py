"""The distance of two models' next-token distributions on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from stages.lora.batches import collate
from stages.lora.loss import trained_logits
from stages.tokens.row import TokenRow


@dataclass(frozen=True)
class Agreement:
    """The distance of two models' next-token distributions over some tokens."""

    mean_divergence: float  # mean KL(adapter ‖ merged), nats a token
    max_divergence: float
    same_choice: float  # share of tokens whose likeliest prediction is the same


def log_probabilities(model: nn.Module, rows: Sequence[TokenRow]) -> list[np.ndarray]:
    """Log-probabilities at each row's trained positions, float32 (N, V) a row, by a model in evaluation mode."""
    result = []
    for row in rows:
        logits_NxV = trained_logits(model, collate([row]))
        result.append(np.array(logits_NxV - mx.logsumexp(logits_NxV, axis=-1, keepdims=True)))
    return result


def compare(reference: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> Agreement:
    """Compare what `log_probabilities` gave for two models on the same rows."""
    divergences, same = [], []
    for p_NxV, q_NxV in zip(reference, other, strict=True):
        divergences.append((np.exp(p_NxV, dtype=np.float64) * (p_NxV.astype(np.float64) - q_NxV)).sum(axis=-1))
        same.append(p_NxV.argmax(axis=-1) == q_NxV.argmax(axis=-1))
    all_divergences = np.concatenate(divergences)
    return Agreement(
        # Rounding can push a divergence of nothing a hair below zero.
        max(float(all_divergences.mean()), 0.0),
        max(float(all_divergences.max()), 0.0),
        float(np.concatenate(same).mean()),
    )
