"""The loss: next-token cross-entropy over trained positions only.

The head is the widest matrix of the model, and its logits the largest array of a step. So the final norm is replaced
by `TrainedPositionsOnly`, which passes on just the trained positions, and whatever follows it (head, scaling, capping)
sees no others. A model whose final norm is not where mlx-lm's decoders have it is left as it is: slower, and as right.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from stages.lora.batches import Batch
from stages.lora.prefix import fed


class TrainedPositionsOnly(nn.Module):
    """Stands in for the final norm: (B, L, D) → (1, N, D) while positions are set, the plain norm otherwise."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self._positions: mx.array | None = None

    def __call__(self, hidden_BxLxD: mx.array) -> mx.array:
        if self._positions is None:
            return self.norm(hidden_BxLxD)
        width = hidden_BxLxD.shape[-1]
        return self.norm(hidden_BxLxD.reshape(1, -1, width)[:, self._positions])


def narrow_head(model: nn.Module) -> bool:
    """Let the head see trained positions only, where the model's layout allows; says whether it does."""
    backbone: Any = getattr(model, "model", None)
    norm = getattr(backbone, "norm", None)
    if not isinstance(norm, nn.Module) or isinstance(norm, TrainedPositionsOnly):
        return isinstance(norm, TrainedPositionsOnly)
    backbone.norm = TrainedPositionsOnly(norm)
    if _passes_on_positions(model):
        return True
    backbone.norm = norm
    return False


def _passes_on_positions(model: nn.Module) -> bool:
    """Whether the narrowed model gives the plain model's logits, on four tokens."""
    tokens_1xL, positions = mx.array([[1, 2, 3, 4]]), mx.array([1, 3])
    plain_LxV = model(tokens_1xL)[0]
    try:
        narrow_NxV = _logits_at(model, tokens_1xL, positions)
    except ValueError:
        return False
    return narrow_NxV.shape == (2, plain_LxV.shape[-1]) and bool(
        mx.allclose(plain_LxV[positions], narrow_NxV, rtol=1e-2, atol=1e-2).item()
    )


def _logits_at(model: nn.Module, tokens_BxL: mx.array, positions_N: mx.array) -> mx.array:
    """Logits at flattened positions, (N, V)."""
    norm = getattr(getattr(model, "model", None), "norm", None)
    if not isinstance(norm, TrainedPositionsOnly):
        logits_BxLxV = model(tokens_BxL)
        return logits_BxLxV.reshape(-1, logits_BxLxV.shape[-1])[positions_N]
    norm._positions = positions_N
    try:
        return model(tokens_BxL)[0]
    finally:
        norm._positions = None


def trained_logits(model: nn.Module, batch: Batch) -> mx.array:
    """The model's logits in float32 at the trained positions, (N, V)."""
    with fed(model, batch.states):
        return _logits_at(model, batch.inputs_BxL, batch.trained_N).astype(mx.float32)


def token_losses(model: nn.Module, batch: Batch) -> mx.array:
    """Negative log-likelihood in nats of each trained token, (N,)."""
    return nn.losses.cross_entropy(trained_logits(model, batch), batch.targets_N)


def sum_loss(model: nn.Module, batch: Batch) -> mx.array:
    """Sum over the batch's trained tokens; padding and untrained tokens do not enter."""
    return token_losses(model, batch).sum()
