"""The adapter folded into the base's weights, and the check that nothing was lost on the way.

W' = W + scale · (A B)ᵀ, formed in float32 and rounded once, to the type that is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from stages.lora.batches import collate
from stages.lora.loss import narrow_head, trained_logits
from stages.text.tokens import TokenRow


def fuse(model: nn.Module, *, dtype: mx.Dtype, requantize: bool) -> list[str]:
    """Replace each adapted module by a plain one; `requantize` packs those that were packed as they were.

    Returns the names of the fused modules.
    """
    fused: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            fused.append((name, _fuse_linear(module, dtype, requantize=requantize)))
    model.update_modules(tree_unflatten(fused))
    mx.eval(model.parameters())
    return [name for name, _ in fused]


def _fuse_linear(module: LoRALinear, dtype: mx.Dtype, *, requantize: bool) -> nn.Module:
    linear = module.linear
    packing: dict[str, Any] | None = None
    weight = linear.weight
    if isinstance(linear, nn.QuantizedLinear):
        packing = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
        biases = None if linear.biases is None else linear.biases.astype(mx.float32)
        scales = linear.scales.astype(mx.float32) if linear.mode == "affine" else linear.scales
        weight = mx.dequantize(linear.weight, scales, biases, **packing)
    delta = module.scale * (module.lora_a.astype(mx.float32) @ module.lora_b.astype(mx.float32)).T
    out_dims, in_dims = weight.shape
    plain = nn.Linear(in_dims, out_dims, bias="bias" in linear)
    plain.weight = (weight.astype(mx.float32) + delta).astype(dtype)
    if "bias" in linear:
        plain.bias = linear.bias
    return nn.QuantizedLinear.from_linear(plain, **packing) if packing and requantize else plain


@dataclass(frozen=True)
class Agreement:
    """How far two models' next-token distributions lie apart over some tokens."""

    mean_divergence: float  # mean KL(adapter ‖ merged), nats a token
    max_divergence: float
    same_choice: float  # share of tokens whose likeliest prediction is the same


def log_probabilities(model: nn.Module, rows: Sequence[TokenRow]) -> list[np.ndarray]:
    """Log-probabilities at each row's trained positions, float32 (N, V) a row."""
    narrow_head(model)
    model.eval()
    result = []
    for row in rows:
        logits_NxV = trained_logits(model, collate([row]))
        result.append(np.array(logits_NxV - mx.logsumexp(logits_NxV, axis=-1, keepdims=True)))
    return result


def agreement(reference: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> Agreement:
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
