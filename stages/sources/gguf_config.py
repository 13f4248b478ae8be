"""A GGUF's metadata → the Hugging Face config of its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from stages.sources.gguf_architectures import Architecture
from stages.sources.gguf_reader import GROUP_SIZE, GgufFile

ROTARY_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Llama 3.1 to 3.3: of the factors in a file only the largest differs from model to model.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def model_config(
    file: GgufFile, architecture: Architecture, weights: Mapping[str, np.ndarray], factors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The config, with MLX's quantisation for each packed tensor; `factors` are the file's ROTARY_FACTORS.

    Raises:
        ValueError: the metadata lacks a number, or scales the rotary embedding in a way that is not known here.
    """

    def number(key: str, default: Any = None) -> Any:
        return file.get(f"{architecture.name}.{key}", default)

    heads, width = number("attention.head_count"), number("embedding_length")
    rotary = number("rope.dimension_count", width // heads)
    head_dim = number("attention.key_length", rotary if architecture.name == "llama" else width // heads)
    whole = any(array.dtype == np.float32 for array in weights.values())
    config: dict[str, Any] = {
        "architectures": [architecture.hf_class],
        "model_type": architecture.model_type,
        "hidden_size": width,
        "num_hidden_layers": number("block_count"),
        "intermediate_size": number("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": float(f"{number('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "max_position_embeddings": number("context_length"),
        "vocab_size": number("vocab_size", len(file.get("tokenizer.ggml.tokens"))),
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "hidden_act": "silu",
        "attention_bias": "model.layers.0.self_attn.o_proj.bias" in weights,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float32" if whole else "float16",
    }
    config |= _own(file, architecture, config, rotary)
    if scaling := _scaling(file, architecture, config, rotary, factors):
        config["rope_scaling"] = scaling
    packed = {name.removesuffix(".scales"): scales for name, scales in weights.items() if name.endswith(".scales")}
    if packed:
        bits = {name: _bits(weights[f"{name}.weight"], scales) for name, scales in packed.items()}
        most = max(set(bits.values()), key=list(bits.values()).count)
        config["quantization"] = {"group_size": GROUP_SIZE, "bits": most} | {
            name: {"group_size": GROUP_SIZE, "bits": b} for name, b in sorted(bits.items()) if b != most
        }
    return config


def _own(file: GgufFile, architecture: Architecture, config: dict[str, Any], rotary: int) -> dict[str, Any]:
    """What one architecture's config says more."""
    name = architecture.name
    if name == "phi3":
        original = file.get("phi3.rope.scaling.original_context_length", config["max_position_embeddings"])
        window = file.get("phi3.attention.sliding_window", 0) or None
        share = rotary / config["head_dim"]
        own = {"original_max_position_embeddings": original, "sliding_window": window, "partial_rotary_factor": share}
        return own if share != 1 else {key: value for key, value in own.items() if key != "partial_rotary_factor"}
    if name == "gemma3":
        if config["num_hidden_layers"] == 62:
            raise ValueError("Gemma 3 of 27B scales its attention in a way that this conversion does not know")
        return {
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": config["head_dim"],
            "sliding_window": file.get("gemma3.attention.sliding_window"),
            "sliding_window_pattern": file.get("gemma3.attention.sliding_window_pattern", 6),
            "rope_local_base_freq": file.get("gemma3.rope.freq_base_swa", 10000.0),
        }
    return {"use_sliding_window": False} if name in ("qwen2", "qwen3") else {}


def _scaling(
    file: GgufFile, architecture: Architecture, config: dict[str, Any], rotary: int, factors: Mapping[str, np.ndarray]
) -> dict[str, Any] | None:
    """The config's `rope_scaling`; None for a plain rotary embedding."""
    if "rope_freqs.weight" in factors:
        return _llama3(factors["rope_freqs.weight"], config["rope_theta"], rotary)
    if "rope_factors_long.weight" in factors and "rope_factors_short.weight" in factors:
        sides = {f"{s}_factor": [float(x) for x in factors[f"rope_factors_{s}.weight"]] for s in ("short", "long")}
        return {"type": "longrope", **sides}
    key = f"{architecture.name}.rope.scaling"
    kind = file.metadata.get(f"{key}.type", "none")
    if kind == "none":
        return None
    scaling = {"type": kind, "rope_type": kind, "factor": file.get(f"{key}.factor")}
    if kind == "linear":
        return scaling
    if kind == "yarn":
        return scaling | {"original_max_position_embeddings": file.get(f"{key}.original_context_length")}
    raise ValueError(f"the GGUF scales its rotary embedding ({kind!r}), which this conversion does not know")


def _llama3(found: np.ndarray, theta: float, rotary: int) -> dict[str, Any]:
    """The scaling of Llama 3 whose factors these are."""
    factor, low, high = float(found.max()), _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    turns = _LLAMA3["original_max_position_embeddings"] / (2 * np.pi * theta ** (np.arange(0, rotary, 2) / rotary))
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(found, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise ValueError("the GGUF scales its rotary embedding by factors that are not Llama 3's")
    return {"rope_type": "llama3", "factor": round(factor, 6), **_LLAMA3}


def _bits(packed: np.ndarray, scales: np.ndarray) -> int:
    """Bits a value takes in rows of 32-bit words."""
    return int(packed.shape[-1] * 32 // (scales.shape[-1] * GROUP_SIZE))
