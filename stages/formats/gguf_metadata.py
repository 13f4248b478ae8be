"""A model's config → the keys of GGUF that llama.cpp computes by, and the factors of its rotary embedding.

Source: the GGUF specification; llama.cpp's `Keys` (gguf-py, constants.py).
"""

from __future__ import annotations

import math
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from mlx_lm.models.rope_utils import initialize_rope

from stages.formats.gguf_source import Source, refusal

_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


# What more a YaRN may say (beta_fast, mscale, attention_factor, …) is not compared with llama.cpp's.
_YARN = {"type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings"}


def model_metadata(source: Source, *, name: str, vocabulary: int, dtype: str) -> dict[str, Any]:
    """Everything but the tokenizer. `vocabulary`: rows of the embedding.

    Raises:
        ValueError: the config scales the rotary embedding in a way that has no proven form.
    """
    args, arch = source.args, source.architecture.name
    length = args.max_position_embeddings
    if length is None:
        raise ValueError(f"{source.directory / 'config.json'}: has no max_position_embeddings; add it")
    general = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(_FILE_TYPES[dtype]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    keys = {
        "vocab_size": vocabulary,
        "context_length": int(length),
        "embedding_length": int(args.hidden_size),
        "block_count": int(args.num_hidden_layers),
        "feed_forward_length": int(args.intermediate_size),
        "attention.head_count": int(args.num_attention_heads),
        "attention.head_count_kv": int(args.num_key_value_heads),
        "attention.layer_norm_rms_epsilon": float(args.rms_norm_eps),
        "attention.key_length": source.head_dim,
        "attention.value_length": source.head_dim,
        "rope.freq_base": float(args.rope_theta),
        "rope.dimension_count": _rotary_width(source),
    }
    if arch == "phi3":
        keys["attention.sliding_window"] = int(source.config.get("sliding_window") or 0)
    if arch == "gemma3":
        keys["attention.sliding_window"] = int(args.sliding_window)
        keys["attention.sliding_window_pattern"] = int(args.sliding_window_pattern)
        keys["rope.freq_base_swa"] = float(args.rope_local_base_freq)
    return general | {f"{arch}.{key}": value for key, value in (keys | _scaling(source)).items()}


def _rotary_width(source: Source) -> int:
    return int(source.head_dim * getattr(source.args, "partial_rotary_factor", 1.0))


def _scaling_kind(source: Source) -> str:
    scaling = source.args.rope_scaling or {}
    return str(scaling.get("type") or scaling.get("rope_type") or "default")


def _scaling(source: Source) -> dict[str, Any]:
    """The keys of a scaled rotary embedding; none for a plain one."""
    scaling, kind = source.args.rope_scaling or {}, _scaling_kind(source)
    if kind in ("default", "llama3"):
        return {}  # Llama 3's is written as factors
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    if kind in ("longrope", "su") and source.architecture.name == "phi3":
        original = int(source.args.original_max_position_embeddings)
        factor = source.args.max_position_embeddings / original
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        return {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": scale}
    if kind == "yarn" and scaling.keys() <= _YARN:
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling["factor"]),
            "rope.scaling.original_context_length": int(scaling["original_max_position_embeddings"]),
        }
    raise refusal(source.directory, f"rope_scaling of the type {kind!r} has no proven form")


def rope_factors(source: Source) -> dict[str, np.ndarray]:
    """The tensors that divide the rotary frequencies, float32 (rotary width / 2,) by name; none for most models."""
    args, kind = source.args, _scaling_kind(source)
    if kind == "llama3":
        width = _rotary_width(source)
        rope = initialize_rope(width, args.rope_theta, False, args.rope_scaling, args.max_position_embeddings)
        plain = args.rope_theta ** (mx.arange(0, width, 2) / width)
        return {"rope_freqs.weight": np.array(rope._freqs / plain).astype(np.float32)}
    if kind in ("longrope", "su"):
        sides = ("long", "short")
        return {f"rope_factors_{s}.weight": np.array(args.rope_scaling[f"{s}_factor"], np.float32) for s in sides}
    return {}
