"""The adapter folded into the base's weights.

W' = W + scale · (A B)ᵀ, for DoRA with each row brought to the norm m, formed in float32 and rounded once, to the type
that is saved.
"""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.utils import quantize_model

from stages.model.kinds import EMBEDDING, SWITCH


def fuse(model: nn.Module, *, dtype: mx.Dtype, requantize: bool) -> list[str]:
    """Replace each adapted module by a plain one; `requantize` packs those that were packed as they were.

    The new weights are computed when they are first used. Returns the names of the fused modules.
    """
    fused: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear | LoRASwitchLinear | LoRAEmbedding | DoRALinear):
            fused.append((name, _fuse_module(module, dtype, requantize=requantize)))
    model.update_modules(tree_unflatten(fused))
    return [name for name, _ in fused]


def quantized(model: nn.Module, config: dict[str, Any], *, bits: int, group_size: int) -> tuple[Any, dict[str, Any]]:
    """A plain model and its config, every module quantised that mlx-lm would quantise."""
    with redirect_stdout(StringIO()):  # mlx-lm tells of the bits a weight
        return quantize_model(model, config, group_size, bits)


def _fuse_module(module: nn.Module, dtype: mx.Dtype, *, requantize: bool) -> nn.Module:
    base = module.embedding if isinstance(module, LoRAEmbedding) else module.linear
    weight, packing = _unpacked(base)
    weight = weight + _update(module)
    if isinstance(module, DoRALinear):
        weight = weight * (module.m.astype(mx.float32) / mx.linalg.norm(weight, axis=1))[:, None]
    plain = _plain(base, weight.astype(dtype))
    return plain.to_quantized(**packing) if packing and requantize else plain


def _unpacked(base: nn.Module) -> tuple[mx.array, dict[str, Any] | None]:
    """The base's weight in float32, and how it was packed."""
    if "scales" not in base:
        return base.weight.astype(mx.float32), None
    packing = {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}
    biases = None if base.biases is None else base.biases.astype(mx.float32)
    scales = base.scales.astype(mx.float32) if base.mode == "affine" else base.scales
    return mx.dequantize(base.weight, scales, biases, **packing).astype(mx.float32), packing


def _update(module: nn.Module) -> mx.array:
    """The matrix that the adapter adds to the weight, in the weight's own layout."""
    a, b = module.lora_a.astype(mx.float32), module.lora_b.astype(mx.float32)
    if isinstance(module, LoRASwitchLinear):
        return module.scale * (b @ a)  # (experts, out, rank) @ (experts, rank, in)
    if isinstance(module, LoRAEmbedding):
        return module.scale * (a @ b)  # (vocabulary, rank) @ (rank, width)
    return module.scale * (a @ b).T


def _plain(base: nn.Module, weight: mx.array) -> nn.Module:
    """A float module of the base's kind, with its bias."""
    if isinstance(base, EMBEDDING):
        plain = nn.Embedding(*weight.shape)
    else:
        kind = SwitchLinear if isinstance(base, SWITCH) else nn.Linear
        plain = kind(*reversed(weight.shape), bias="bias" in base)
    plain.weight = weight
    if "bias" in base:
        plain.bias = base.bias
    return plain
