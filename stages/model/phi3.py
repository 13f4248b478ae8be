"""Phi-3 as its reference computes it: the language model of a Phi-3-Vision checkpoint, and positions of 128k models.

Source: modeling_phi3.py and modeling_rope_utils.py of transformers; Ding et al., "LongRoPE" (arXiv 2402.13753).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import phi3
from mlx_lm.models.rope_utils import SuScaledRoPE

_VISION_WEIGHTS = "model.vision_embed_tokens."
_VISION_KEYS = ("auto_map", "embd_layer", "img_processor")


class LanguageModel(phi3.Model):
    """Phi-3 that skips the weights of a vision tower."""

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return {name: array for name, array in weights.items() if not name.startswith(_VISION_WEIGHTS)}


def language_model_classes(config: dict[str, Any]) -> tuple[type[nn.Module], type]:
    """The classes for mlx-lm's `load_model`."""
    return LanguageModel, phi3.ModelArgs


def as_language_model(config: dict[str, Any]) -> dict[str, Any]:
    """Turn a Phi-3-Vision config into that of its language model alone, a plain Phi-3."""
    plain = {key: value for key, value in config.items() if key not in _VISION_KEYS}
    plain |= {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
    if (scaling := plain.get("rope_scaling")) and scaling.get("type") == "su":
        plain["rope_scaling"] = scaling | {"type": "longrope"}  # the same, by the name that Phi-3's code has for it now
    return plain


class LongRoPE(nn.Module):
    """Rotary positions with the short factors up to the original context's length, and the long ones beyond.

    It wraps mlx-lm's `SuScaledRoPE`, which uses the long factors at any length. For a row within the original context
    these are other positions than those that the model was trained with.
    """

    def __init__(self, long: SuScaledRoPE, *, base: float, short_factor: list[float]) -> None:
        super().__init__()
        self._long = long
        exponents = mx.arange(0, long.dim, 2, dtype=mx.float32) / long.dim
        self._short_freqs = mx.array(short_factor, dtype=mx.float32) * base**exponents

    @property
    def original_length(self) -> int:
        return int(self._long.original_max_position_embeddings)

    def __call__(self, x_BxHxLxD: mx.array, offset: int | mx.array = 0) -> mx.array:
        rope, length = self._long, x_BxHxLxD.shape[-2]
        if isinstance(offset, mx.array):  # one a row, in batched generation
            is_long = offset.max() + length > rope.original_max_position_embeddings
            freqs = mx.where(is_long, rope._freqs, self._short_freqs)
        else:
            is_long = offset + length > rope.original_max_position_embeddings
            freqs = rope._freqs if is_long else self._short_freqs
        scaled = x_BxHxLxD.at[..., : rope.dim].multiply(rope._scale)
        return mx.fast.rope(scaled, rope.dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=freqs)


def restore_short_factors(model: nn.Module) -> None:
    """Give each layer of a Phi-3 with long-context scaling the positions of its reference."""
    if not isinstance(model, phi3.Model):
        return
    for layer in model.layers:
        rope = layer.self_attn.rope
        if isinstance(rope, SuScaledRoPE):
            short = model.args.rope_scaling["short_factor"]
            layer.self_attn.rope = LongRoPE(rope, base=model.args.rope_theta, short_factor=short)
