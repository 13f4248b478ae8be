"""A GGUF → a model directory in mlx-lm's layout: Llama, Qwen 2, Qwen 3, Phi-3 and Gemma 3.

`convert(gguf, out)` writes config.json, model.safetensors, tokenizer.json and tokenizer_config.json.
Weights in Q4_0, Q4_1 and Q8_0 stay packed, bit for bit: these are MLX's affine quantisation with groups of 32. A file
that holds another kind (Q4_K, Q6_K, …) is unpacked as a whole, to float16; float32, float16 and bfloat16 keep their
values. The same GGUF gives the same bytes on every machine.

Source: the GGUF specification (ggml-org/ggml, docs/gguf.md) and llama.cpp's conversion of Llama models, which permutes
the rows of q and k for its own rotary embedding.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from stages.sources.gguf_architectures import ARCHITECTURES, LLAMA, Architecture, unpermute
from stages.sources.gguf_config import ROTARY_FACTORS, model_config
from stages.sources.gguf_reader import GgufFile
from stages.sources.gguf_tokenizer import write_tokenizer

_KINDS = "weight|bias|scales|biases"  # a tensor, and what MLX makes of a packed one


def convert(gguf: Path, out: Path) -> None:
    """Write the model in `gguf` to the directory `out`.

    Raises:
        ValueError: the architecture, a tensor, the tokenizer or metadata is none that this conversion knows.
    """
    file = GgufFile(gguf)
    name = file.metadata.get("general.architecture")
    architecture = next((each for each in ARCHITECTURES if each.name == name), None)
    if architecture is None:
        known = ", ".join(each.name for each in ARCHITECTURES)
        raise ValueError(f"{gguf.name} holds a {name!r} model; only these convert: {known}")
    heads = file.get(f"{name}.attention.head_count")
    kv_heads = file.get(f"{name}.attention.head_count_kv", heads)

    tensors = file.tensors()
    factors = {each: tensors.pop(each) for each in ROTARY_FACTORS if each in tensors}
    weights: dict[str, np.ndarray] = {}
    for gguf_name, array in tensors.items():
        target = hf_name(gguf_name, architecture)
        module = target.rpartition(".")[0]
        if count := architecture.permuted_heads(module, heads=heads, kv_heads=kv_heads):
            array = unpermute(array, heads=count)
        if architecture.norm_shift and module.endswith("norm"):
            array = _unshifted(array, architecture.norm_shift)
        weights[target] = array

    weights = _in_fewest_bytes(weights)
    config = model_config(file, architecture, weights, factors)
    out.mkdir(parents=True, exist_ok=True)
    _write_weights(weights, out)
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (out / "config.json").write_text(text + "\n", encoding="utf-8")
    write_tokenizer(file, out)


def _unshifted(stored: np.ndarray, shift: int) -> np.ndarray:
    """The weights of a norm, which the file has plus `shift`: where adding rounded, the nearest float16 that fits."""
    exact = stored.astype(np.float32) - np.float32(shift)
    half = exact.astype(np.float16).astype(np.float32)
    return np.where(half + np.float32(shift) == stored, half, exact)


def _in_fewest_bytes(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All float32 tensors in float16, if that changes no value: norms are float32 in every GGUF, widened from less."""
    with np.errstate(over="ignore"):
        half = {name: w.astype(np.float16) for name, w in weights.items() if w.dtype == np.float32}
    return weights | half if all(np.array_equal(half[name], weights[name]) for name in half) else weights


def hf_name(name: str, architecture: Architecture = LLAMA) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`.

    Raises:
        ValueError: the architecture has no such tensor.
    """
    module, _, kind = name.rpartition(".")
    target = architecture.hf_module(module)
    if target is None or not re.fullmatch(_KINDS, kind) or (kind == "bias" and not architecture.has(target, kind)):
        raise ValueError(
            f"the GGUF tensor {name!r} has no place in a {architecture.hf_class.removesuffix('ForCausalLM')}"
        )
    return f"{target}.{kind}"


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
