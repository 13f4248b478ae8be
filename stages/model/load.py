"""A base model's folder → an MLX model in the float type that suits the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model, load_config, load_model

from stages.model import phi3
from stages.model.kinds import SWITCH

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def on_cpu() -> bool:
    """True where MLX computes on the CPU."""
    return mx.default_device().type == mx.DeviceType.cpu


def load_base(
    directory: Path,
    *,
    dtype: str = "auto",
    dequantize: bool | None = None,
    keep_dtype: bool = False,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """The frozen model in evaluation mode, and its config; of a Phi-3-Vision checkpoint the language model alone.

    Weights are read, and dequantised, when they are first computed with: a layer that never runs takes no memory.
    `dtype` "auto" is float32 on a CPU, where halves are slow, and the model's own elsewhere or with `keep_dtype`.
    `dequantize` None means on a CPU, where quantised matrix products are slow, and not elsewhere.

    Raises:
        ValueError: mlx-lm does not know the architecture, weights and config do not fit, or the device lacks the type.
    """
    model, config = _open(directory, trust_remote_code=trust_remote_code)
    target = DTYPES.get(dtype)
    if target is None:
        target = mx.float32 if on_cpu() and not keep_dtype else floating_dtype(model)
    if on_cpu() and not keep_dtype and target != mx.float32 and has_experts(model):
        raise ValueError("model.dtype: MLX computes experts on a CPU in float32 alone; set it to auto or float32")
    if on_cpu() if dequantize is None else dequantize:
        model = dequantized(model)
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    model.set_dtype(target)
    model.freeze()
    model.eval()
    return model, config


def _open(directory: Path, *, trust_remote_code: bool) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's model and config, weights not read yet."""
    if load_config(directory).get("model_type") != "phi3_v":
        model, config = load_model(directory, lazy=True, trust_remote_code=trust_remote_code)
    else:
        model, config = load_model(directory, lazy=True, get_model_classes=phi3.language_model_classes)
        config = phi3.as_language_model(config)
    phi3.restore_short_factors(model)
    return model, config


def has_experts(model: nn.Module) -> bool:
    """True for a mixture of experts."""
    return any(isinstance(module, SWITCH) for module in model.modules())


def dequantized(model: nn.Module) -> nn.Module:
    """The model with plain weights in float32, for dequantising rounds to the type of the scales."""
    model.set_dtype(mx.float32)
    return dequantize_model(model)


def floating_dtype(model: nn.Module) -> mx.Dtype:
    """The type of most of the model's floating-point weights."""
    sizes: dict[mx.Dtype, int] = {}
    for _, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            sizes[array.dtype] = sizes.get(array.dtype, 0) + array.size
    return max(sizes, key=lambda kind: sizes[kind])
