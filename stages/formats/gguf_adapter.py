"""An adapter's folder → an adapter in GGUF, which `llama-server -m base.gguf --lora adapter.gguf` puts onto the base.

`export_adapter(Path("artifacts/adapter"), base, Path("adapter.gguf"))`

Source: llama.cpp's `llama-adapter.cpp`: y = W x + alpha / rank · B (A x), with A (rank, in) and B (out, rank).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Kind

from stages.files.outputs import replacing
from stages.formats import gguf_file
from stages.formats.gguf_file import Tensor
from stages.formats.gguf_model import Summary
from stages.formats.gguf_source import Source, Weights, open_source
from stages.lora import adapter_files

_MERGE = "merge it and export the merged model"


def export_adapter(adapter_dir: Path, base_dir: Path, out_file: Path) -> Summary:
    """Write an adapter in mlx-lm's format as GGUF, for the model in `base_dir` as GGUF, packed there or not.

    Values are float32. The file is read back and compared.

    Raises:
        ValueError: the adapter is DoRA, adapts a module that llama.cpp puts no adapter on, or is no adapter of this
            base; or the file does not read back as what was written. Nothing is left then.
    """
    config = adapter_files.read_config(adapter_dir)
    if config.type != "lora":
        raise ValueError(f"{adapter_dir}: llama.cpp has no form for {config.type}; {_MERGE}")
    source = open_source(base_dir)
    weights = adapter_files.read_weights(adapter_dir / adapter_files.WEIGHTS_FILE)
    arrays = {name: np.array(array).astype(np.float32) for name, array in weights.items()}
    modules = sorted({name.rpartition(".")[0] for name in arrays})
    base = Weights(source)
    tensors = [tensor for module in modules for tensor in _pair(module, arrays, source, base, adapter_dir)]
    metadata = {
        "general.type": "adapter",
        "general.name": adapter_dir.resolve().name,
        "general.file_type": 0,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(config.scale * config.rank),
    }
    with replacing(out_file) as draft:
        gguf_file.write(draft, source.architecture.name, metadata, tensors)
        gguf_file.verify(draft, metadata, tensors)
    return Summary(source.architecture.name, len(tensors), out_file.stat().st_size, "f32")


def _pair(
    module: str, arrays: dict[str, np.ndarray], source: Source, base: Weights, directory: Path
) -> tuple[Tensor, Tensor]:
    """The two tensors of an adapted module."""
    if module.endswith("embed_tokens"):
        raise ValueError(f"{directory}: an adapter on the embedding has no proven form in llama.cpp; {_MERGE}")
    target = source.architecture.gguf_module(module)
    if target is None or f"{module}.weight" not in base.names():
        raise ValueError(f"{directory}: adapts {module}, which {source.directory} lacks; name the adapter's own base")
    a, b = arrays.get(f"{module}.lora_a"), arrays.get(f"{module}.lora_b")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2:
        raise ValueError(f"{directory}: llama.cpp has no form for the adapter on {module}; {_MERGE}")
    if (b.shape[1], a.shape[0]) != base.shape(f"{module}.weight") or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"{directory}: the adapter on {module} is for a matrix of {b.shape[1]} × {a.shape[0]}, that of "
            f"{source.directory} is {' × '.join(map(str, base.shape(f'{module}.weight')))}; name the adapter's own base"
        )
    heads = source.architecture.permuted_heads(
        module, heads=source.args.num_attention_heads, kv_heads=source.args.num_key_value_heads
    )
    # llama.cpp knows the rows of q and k in another order: those of B are theirs.
    return _turned(f"{target}.weight.lora_a", a, None), _turned(f"{target}.weight.lora_b", b, heads)


def _turned(name: str, array: np.ndarray, heads: int | None) -> Tensor:
    return Tensor(name, array.T.shape, Kind.F32, partial(np.ascontiguousarray, array.T), heads=heads)
