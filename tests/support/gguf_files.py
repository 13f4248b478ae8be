"""GGUF files, written by hand.

Source: the GGUF specification, version 3, and the block layouts of ggml's Q4_0, Q4_1, Q8_0.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

GROUP, ALIGNMENT = 32, 32


F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30


HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 4, 2, 16, 2
THETA, EPSILON = 500.0, 1e-5
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
KINDS = {"F32": F32, "F16": F16, "BF16": BF16, "Q4_0": Q4_0, "Q4_1": Q4_1, "Q8_0": Q8_0}


def tokens() -> list[str]:
    """Three special tokens, the 256 bytes as byte-level BPE writes them, three merges."""
    from tokenizers import pre_tokenizers

    return [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "Ġhe", "12"]


def metadata(**changes: Any) -> dict[str, Any]:
    """A tiny Llama's metadata; a change to None leaves the key out."""
    vocabulary = tokens()
    content = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": MLP,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": EPSILON,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.rope.freq_base": THETA,
        "llama.vocab_size": len(vocabulary),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [1] * (len(vocabulary) - len(SPECIALS)),
        "tokenizer.ggml.merges": ["h e", "Ġ he", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in content.items() if value is not None}


def tensors(kind: int = F32, *, embedding: int | None = None, tied: bool = True, seed: int = 0) -> dict[str, Any]:
    """Random weights by llama.cpp's names: (type, array) each; norms are always float32, as in every GGUF."""
    random = np.random.default_rng(seed)
    vocabulary = len(tokens())

    def matrix(rows: int, columns: int, type_: int = kind) -> tuple[int, np.ndarray]:
        return type_, random.normal(0, 0.3, (rows, columns)).astype(np.float32)

    def norm() -> tuple[int, np.ndarray]:
        # Values that float16 holds, as those of a model trained in a half type.
        return F32, random.uniform(0.5, 1.5, HIDDEN).astype(np.float16).astype(np.float32)

    result = {"token_embd.weight": matrix(vocabulary, HIDDEN, kind if embedding is None else embedding)}
    for layer in range(LAYERS):
        result |= {
            f"blk.{layer}.attn_norm.weight": norm(),
            f"blk.{layer}.attn_q.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_k.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_v.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_output.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
            f"blk.{layer}.ffn_norm.weight": norm(),
            f"blk.{layer}.ffn_gate.weight": matrix(MLP, HIDDEN),
            f"blk.{layer}.ffn_up.weight": matrix(MLP, HIDDEN),
            f"blk.{layer}.ffn_down.weight": matrix(HIDDEN, MLP),
        }
    result["output_norm.weight"] = norm()
    return result if tied else result | {"output.weight": matrix(vocabulary, HIDDEN)}


def tiny_gguf(path: Path, weights: Mapping[str, Any] | None = None, meta: Mapping[str, Any] | None = None) -> Path:
    """Write a GGUF; by default a small Llama in Q4_1 with its embedding in Q8_0."""
    weights = tensors(Q4_1, embedding=Q8_0) if weights is None else weights
    meta = metadata() if meta is None else meta
    head = b"GGUF" + struct.pack("<IQQ", 3, len(weights), len(meta))
    head += b"".join(_string(key) + _value(value) for key, value in meta.items())
    data = b""
    for name, (kind, array) in weights.items():
        sizes = struct.pack(f"<I{array.ndim}Q", array.ndim, *reversed(array.shape))
        head += _string(name) + sizes + struct.pack("<IQ", kind, len(data))
        data += _pad(encode(kind, array))
    path.write_bytes(_pad(head) + data)
    return path


def encode(kind: int, array: np.ndarray) -> bytes:
    """A tensor's bytes in the file."""
    if kind == F32:
        return array.astype("<f4").tobytes()
    if kind == F16:
        return array.astype("<f2").tobytes()
    if kind == BF16:
        return (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return b"".join(_blocks(kind, array.reshape(-1, GROUP)))


def decode(kind: int, array: np.ndarray) -> np.ndarray:
    """The values that a reader of the file sees in float32, by ggml's formulas."""
    raw = encode(kind, array)
    if kind == F32:
        values = np.frombuffer(raw, "<f4")
    elif kind == F16:
        values = np.frombuffer(raw, "<f2").astype(np.float32)
    elif kind == BF16:
        values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.concatenate([_unblock(kind, block) for block in _split(raw, {Q4_0: 18, Q4_1: 20, Q8_0: 34}[kind])])
    return values.reshape(array.shape)


def _blocks(kind: int, rows: np.ndarray) -> Iterator[bytes]:
    for row in rows:
        if kind == Q8_0:
            scale = np.float16(np.abs(row).max() / 127)
            yield scale.tobytes() + np.clip(np.round(row / np.float32(scale)), -127, 127).astype(np.int8).tobytes()
            continue
        if kind == Q4_0:
            scale = np.float16(np.abs(row).max() / 8)
            head, codes = scale.tobytes(), row / np.float32(scale) + 8
        else:
            scale, low = np.float16((row.max() - row.min()) / 15), np.float16(row.min())
            head, codes = scale.tobytes() + low.tobytes(), (row - np.float32(low)) / np.float32(scale)
        nibbles = np.clip(np.round(codes), 0, 15).astype(np.uint8)
        # The first half of a block lies in the low nibbles, the second in the high.
        yield head + (nibbles[:16] | nibbles[16:] << 4).tobytes()


def _unblock(kind: int, block: bytes) -> np.ndarray:
    scale = np.float32(np.frombuffer(block[:2], "<f2")[0])
    if kind == Q8_0:
        return scale * np.frombuffer(block[2:], np.int8).astype(np.float32)
    packed = np.frombuffer(block[-16:], np.uint8)
    codes = np.concatenate([packed & 15, packed >> 4]).astype(np.float32)
    return scale * (codes - 8) if kind == Q4_0 else scale * codes + np.float32(np.frombuffer(block[2:4], "<f2")[0])


def _split(raw: bytes, size: int) -> Iterator[bytes]:
    return (raw[i : i + size] for i in range(0, len(raw), size))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)


def _pad(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % ALIGNMENT)
