"""Tiny models of every architecture that is exported to GGUF, of sizes that llama.cpp takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from tests.support import gguf_tokenizers
from tests.support.tiny import write_model

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "head_dim": 32,
    "vocab_size": gguf_tokenizers.VOCABULARY,
}
_CHANGES: dict[str, dict[str, Any]] = {
    # Heads enough for a wrong order of rows to show; a width of heads that is not hidden_size / heads.
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"num_attention_heads": 3},
    # Seven layers: one with global attention among the six of a round, and a row longer than the window.
    "gemma3_text": {
        "num_hidden_layers": 7,
        "query_pre_attn_scalar": 32,
        "sliding_window_pattern": 6,
        "sliding_window": 8,
        "rope_local_base_freq": 3000.0,
        "rope_theta": 1000000.0,
    },
}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3", "gemma3_text")


def write_exportable(folder: Path, architecture: str, **changes: Any) -> Path:
    """Write a random model with a trained tokenizer: of SentencePiece's kind for Phi-3 and Gemma, else byte-level."""
    ids = {"eos_token_id": None, "bos_token_id": None}
    write_model(folder, architecture, **(_SIZES | _CHANGES.get(architecture, {}) | ids | changes))
    _vary_norms(folder / "model.safetensors", around=0.0 if architecture == "gemma3_text" else 1.0)
    if architecture in ("phi3", "gemma3_text"):
        gguf_tokenizers.write_sentencepiece(folder, prefix=architecture == "phi3")
    else:
        gguf_tokenizers.write_byte_level(folder, "llama-bpe" if architecture == "llama" else "qwen2")
    return folder


def _vary_norms(path: Path, *, around: float) -> None:
    """Give the norms weights that differ: of ones, any order is the same."""
    import mlx.core as mx

    weights = cast(dict[str, mx.array], mx.load(str(path)))
    mx.eval(weights)
    for i, name in enumerate(sorted(weights)):
        if name.endswith("norm.weight"):
            noise = 0.1 * mx.random.normal(weights[name].shape, key=mx.random.key(i))
            weights[name] = (around + noise).astype(weights[name].dtype)
    mx.save_safetensors(str(path), weights, metadata={"format": "pt"})
