"""An adapted linear module as one operation on a CPU, which keeps nothing but its input and output for the way back.

mlx-lm's `LoRALinear` adds in three steps, and the output of each stays in memory until the gradients are there: with
all linear modules adapted, that is most of what a step takes. Here they are one custom function, whose gradients by the
input and by A and B are written out: y = x Wᵀ + s (d A) B, d the input after dropout. Source: Hu et al., "LoRA:
Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), section 4.1.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn


def can_run(module: Any) -> bool:
    """True for a `LoRALinear` around a plain linear module in float32 whose own weights are frozen."""
    linear = module.linear
    is_plain = type(linear) is nn.Linear and linear.weight.dtype == module.lora_a.dtype == mx.float32
    return is_plain and not linear.trainable_parameters()


def adapted(module: Any, x: mx.array) -> mx.array:
    """The output of a `LoRALinear` that `can_run`, (..., D_out)."""
    weight, scale = module.linear.weight, float(module.scale)
    bias = module.linear.bias if "bias" in module.linear else None
    # The same array twice without dropout: both gradients reach it.
    dropped = module.dropout(x)

    @mx.custom_function
    def product(x: mx.array, dropped: mx.array, a: mx.array, b: mx.array) -> mx.array:
        plain = x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)
        return plain + (dropped @ (scale * a)) @ b

    @product.vjp
    def vjp(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        _, dropped, a, b = primals
        dropped_NxD, d_y_NxO = (array.reshape(-1, array.shape[-1]) for array in (dropped, cotangent))
        d_low_NxR = scale * (d_y_NxO @ b.T)
        d_a, d_b = dropped_NxD.T @ d_low_NxR, scale * ((dropped_NxD @ a).T @ d_y_NxO)
        return cotangent @ weight, (d_low_NxR @ a.T).reshape(dropped.shape), d_a, d_b

    return cast(mx.array, product(x, dropped, module.lora_a, module.lora_b))
