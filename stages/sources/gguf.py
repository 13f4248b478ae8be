"""A Llama in GGUF → a model directory in mlx-lm's layout.

`convert(gguf, out)` writes config.json, model.safetensors, tokenizer.json and tokenizer_config.json.
Quantised weights stay so, bit for bit: llama.cpp's Q4_1 and Q8_0 blocks are MLX's affine quantisation with groups of
32. float32 and float16 keep their values; MLX reads bfloat16 and llama.cpp's other quantisations as float16.
The same GGUF gives the same bytes on every machine.

Source: the GGUF specification (ggml-org/ggml, docs/gguf.md) and llama.cpp's conversion of Llama models, which permutes
the rows of q and k for its own rotary embedding.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import numpy as np

GROUP_SIZE = 32  # values that share a scale in every GGUF quantisation that MLX reads
SPECIAL_TOKEN = 3  # LLAMA_TOKEN_TYPE_CONTROL
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_KINDS = "weight|scales|biases"  # a tensor, and what MLX makes of a quantised one
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert(gguf: Path, out: Path) -> None:
    """Write the model in `gguf` to the directory `out`.

    Raises:
        ValueError: not a Llama, or a tensor, a tokenizer or metadata that this conversion does not know.
    """
    tensors, metadata = _load(gguf)
    if metadata.get("general.architecture") != "llama":
        raise ValueError(f"{gguf.name} holds a {metadata.get('general.architecture')!r} model; only 'llama' converts")
    if (scaling := metadata.get("llama.rope.scaling.type", "none")) != "none":
        raise ValueError(f"{gguf.name} scales its rotary embedding ({scaling!r}), which this conversion does not know")
    heads = {"q_proj": _number(metadata, "llama.attention.head_count")}
    heads["k_proj"] = _number(metadata, "llama.attention.head_count_kv", heads["q_proj"])

    weights: dict[str, np.ndarray] = {}
    for gguf_name, tensor in tensors.items():
        name = hf_name(gguf_name)
        array = np.array(tensor)
        projection = name.split(".")[-2]
        if projection in heads:
            array = unpermute(array, heads=heads[projection])
        weights[name] = array

    weights = _in_fewest_bytes(weights)
    out.mkdir(parents=True, exist_ok=True)
    _write_weights(weights, out)
    _write_json(out / "config.json", llama_config(metadata, weights))
    _write_tokenizer(metadata, out)


def _load(gguf: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    import mlx.core as mx

    try:
        return cast(tuple[dict[str, Any], dict[str, Any]], mx.load(str(gguf), return_metadata=True))
    except RuntimeError as error:
        raise ValueError(f"{gguf.name} cannot be read as GGUF: {error}") from None


def _in_fewest_bytes(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All float32 tensors in float16, if that changes no value: norms are float32 in every GGUF, widened from less."""
    with np.errstate(over="ignore"):
        half = {name: w.astype(np.float16) for name, w in weights.items() if w.dtype == np.float32}
    return weights | half if all(np.array_equal(half[name], weights[name]) for name in half) else weights


def _number(metadata: dict[str, Any], key: str, default: Any = None) -> Any:
    """A number of the metadata; `default` is the GGUF specification's, where it has one."""
    return default if default is not None and key not in metadata else _get(metadata, key).item()


def _get(metadata: dict[str, Any], key: str) -> Any:
    if key not in metadata:
        raise ValueError(f"the GGUF has no {key!r}")
    return metadata[key]


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    if layer := re.fullmatch(rf"blk\.(\d+)\.(\w+)\.({_KINDS})", name):
        number, part, kind = layer.groups()
        if part in _LAYER_NAMES:
            return f"model.layers.{number}.{_LAYER_NAMES[part]}.{kind}"
    part, _, kind = name.rpartition(".")
    if part in _TOP_NAMES and re.fullmatch(_KINDS, kind):
        return f"{_TOP_NAMES[part]}.{kind}"
    raise ValueError(f"the GGUF tensor {name!r} has no place in a Llama")


def unpermute(rows: np.ndarray, *, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of each head's rotary halves, shape (heads · head_dim, …).

    It moves whole rows, and quantisation runs along a row, so packed weights, scales and biases move alike.
    """
    head_dim = rows.shape[0] // heads
    return rows.reshape(heads, head_dim // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def llama_config(metadata: dict[str, Any], weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """The Hugging Face config of the model, with MLX's quantisation for each packed tensor."""

    def number(key: str, default: Any = None) -> Any:
        return _number(metadata, key, default)

    heads, width = number("llama.attention.head_count"), number("llama.embedding_length")
    tied = "lm_head.weight" not in weights
    whole = any(array.dtype == np.float32 for array in weights.values())
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": number("llama.block_count"),
        "intermediate_size": number("llama.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("llama.attention.head_count_kv", heads),
        "head_dim": number("llama.rope.dimension_count", width // heads),
        "rms_norm_eps": float(f"{number('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": number("llama.rope.freq_base", 10000.0),
        "max_position_embeddings": number("llama.context_length"),
        "vocab_size": number("llama.vocab_size", len(_get(metadata, "tokenizer.ggml.tokens"))),
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": number("tokenizer.ggml.bos_token_id"),
        "eos_token_id": number("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float32" if whole else "float16",
    }
    packed = {name.removesuffix(".scales"): scales for name, scales in weights.items() if name.endswith(".scales")}
    if packed:
        bits = {name: _bits(weights[f"{name}.weight"], scales) for name, scales in packed.items()}
        most = max(set(bits.values()), key=list(bits.values()).count)
        config["quantization"] = {"group_size": GROUP_SIZE, "bits": most} | {
            name: {"group_size": GROUP_SIZE, "bits": b} for name, b in sorted(bits.items()) if b != most
        }
    return config


def _bits(packed: np.ndarray, scales: np.ndarray) -> int:
    """Bits a value takes in rows of 32-bit words."""
    return packed.shape[-1] * 32 // (scales.shape[-1] * GROUP_SIZE)


def _write_weights(weights: dict[str, np.ndarray], out: Path) -> None:
    # safetensors' own writer, for its fixed order of tensors: MLX's follows a hash map's.
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = out / "model.safetensors"
    try:
        save_file({name: np.ascontiguousarray(w) for name, w in weights.items()}, path, metadata={"format": "mlx"})
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"{path}: cannot be written: {error}") from None
    path.chmod(0o644)


def _write_tokenizer(metadata: dict[str, Any], out: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"the tokenizer {kind[0]!r} with pre-tokenizer {kind[1]!r} is not one this conversion knows")
    tokens: list[str] = _get(metadata, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _get(metadata, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = np.array(_get(metadata, "tokenizer.ggml.token_type"))
    special = [tokens[i] for i in np.flatnonzero(types == SPECIAL_TOKEN)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(out / "tokenizer.json"))

    def token(role: str) -> str:
        return tokens[_number(metadata, f"tokenizer.ggml.{role}_token_id")]

    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": token("bos"),
            "eos_token": token("eos"),
            "pad_token": token("padding"),
            "unk_token": token("unknown"),
            "model_max_length": _number(metadata, "llama.context_length"),
            "clean_up_tokenization_spaces": False,
            "chat_template": _get(metadata, "tokenizer.chat_template"),
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
