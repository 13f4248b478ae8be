"""A model directory → one GGUF file for llama.cpp, Ollama and LM Studio, read back and compared before it is there.

`export_model(Path("artifacts/merged"), Path("model.gguf"), dtype="q8_0")`
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Kind

from stages.files.outputs import replacing
from stages.formats import gguf_file
from stages.formats.gguf_file import Tensor
from stages.formats.gguf_metadata import model_metadata, rope_factors
from stages.formats.gguf_source import Source, Weights, open_source, refusal
from stages.formats.gguf_tokenizer import Vocabulary, generation_config, read_vocabulary


@dataclass(frozen=True)
class Summary:
    """What an export wrote: the architecture by llama.cpp's name, tensors in the file, its bytes, and its type."""

    architecture: str
    tensors: int
    size: int
    dtype: str


def export_model(model_dir: Path, out_file: Path, *, dtype: str = "f16") -> Summary:
    """Write a Hugging Face or MLX model directory as one GGUF, and read it back; packed weights are unpacked.

    `dtype`: f32, f16, bf16 or q8_0, of the matrices; vectors are float32. One tensor is in memory at a time.

    Raises:
        ValueError: the architecture, its options or the tokenizer have no proven form in GGUF; a value does not fit
            the type; or the file does not read back as what was written. Nothing is left then.
    """
    if dtype not in gguf_file.DTYPES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(gguf_file.DTYPES)}; K-quants: llama-quantize")
    source = open_source(model_dir)
    tensors = model_tensors(source, dtype)
    rows = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    vocabulary = read_vocabulary(model_dir, rows=rows, config=generation_config(model_dir, source.config))
    name = _name(model_dir, vocabulary)
    metadata = model_metadata(source, name=name, vocabulary=rows, dtype=dtype) | vocabulary.metadata
    with replacing(out_file) as draft:
        gguf_file.write(draft, source.architecture.name, metadata, tensors)
        gguf_file.verify(draft, metadata, tensors)
    return Summary(source.architecture.name, len(tensors), out_file.stat().st_size, dtype)


def model_tensors(source: Source, dtype: str) -> list[Tensor]:
    """All tensors of a model, in the order of the file: llama.cpp's names, sorted, layers by number.

    Raises:
        ValueError: the directory has a tensor that the architecture has no place for, or lacks one.
    """
    weights, architecture = Weights(source), source.architecture
    heads, kv_heads = source.args.num_attention_heads, source.args.num_key_value_heads
    tensors = []
    for name in weights.names():
        module, _, kind = name.rpartition(".")
        target = architecture.gguf_module(module)
        if target is None or not architecture.has(module, kind):
            raise refusal(source.directory, f"the tensor {name} has no proven form")
        shape = weights.shape(name)
        tensors.append(
            Tensor(
                f"{target}.{kind}",
                shape,
                gguf_file.kind_for(shape, dtype),
                partial(weights.read, name),
                heads=architecture.permuted_heads(module, heads=heads, kv_heads=kv_heads),
                shift=architecture.norm_shift if module.endswith("norm") else 0,
            )
        )
    for name, factors in rope_factors(source).items():
        tensors.append(Tensor(name, factors.shape, Kind.F32, partial(np.copy, factors)))
    _check_whole(source, {tensor.name for tensor in tensors})
    return sorted(tensors, key=_place)


def _check_whole(source: Source, names: set[str]) -> None:
    layers = range(source.args.num_hidden_layers)
    modules = [f"blk.{layer}.{module}" for layer in layers for module in source.architecture.modules.values()]
    wanted = [f"{module}.weight" for module in ["token_embd", "output_norm", *modules]]
    if missing := [name for name in wanted if name not in names]:
        raise ValueError(f"{source.directory}: lacks the tensor {missing[0]} (llama.cpp's name); take a whole copy")


def _place(tensor: Tensor) -> tuple[int, int, str]:
    parts = tensor.name.split(".")
    return (1, int(parts[1]), tensor.name) if parts[0] == "blk" else (0, 0, tensor.name)


def _name(directory: Path, vocabulary: Vocabulary) -> str:
    """The model's name. llama.cpp takes white space after control tokens away by it: of a Phi-3, and of no other."""
    name = directory.resolve().name
    if vocabulary.strips_right:
        return f"Phi-3 {name}"
    plain = name.lower().replace("phi-3", "phi3")
    return name if "phi3" not in plain else plain.replace("phi3", "phi 3")
