"""Peak memory of merge on a large base model, beside the size of its weights.

`python -m benchmarks.merge_memory --gb 3`: a random Llama in bfloat16 is written shard by shard into a temporary
folder, an adapter and token rows beside it, and `stages.merge` runs on them in a process of its own.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import ground
from benchmarks.processes import ROOT, overrides, run
from stages.base.manifest import Manifest, read_manifest
from stages.cli import console

GB = 1e9
WIDTH, INNER, HEADS, KEYS, HEAD_SIZE, VOCABULARY = 2048, 5632, 16, 8, 128, 32768
LAYERS_A_SHARD, ADAPTED, RANK, ROWS, LENGTH = 4, 8, 8, 4, 128
_BYTES = {"bfloat16": 2, "float32": 4}
# A layer's modules: (out, in).
_SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD_SIZE, WIDTH),
    "self_attn.k_proj": (KEYS * HEAD_SIZE, WIDTH),
    "self_attn.v_proj": (KEYS * HEAD_SIZE, WIDTH),
    "self_attn.o_proj": (WIDTH, HEADS * HEAD_SIZE),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}


def benchmark(
    gb: Annotated[float, typer.Option(min=0.2, help="Size of the weights on the disk.")] = 3.0,
    dtype: Annotated[str, typer.Option(help="Of the weights: bfloat16 or float32.")] = "bfloat16",
    settings: Annotated[list[str] | None, typer.Option("--set", help="For merge, as --set there.")] = None,
) -> None:
    """Write model, adapter and rows; merge; print peak memory, weights and largest shard."""
    if dtype not in _BYTES:
        raise ValueError(f"--dtype {dtype}: bfloat16 or float32")
    with tempfile.TemporaryDirectory(prefix="lorabuild-merge-") as temporary:
        folder = Path(temporary)
        (folder / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
        with console.progress("writing the base model, an adapter and rows"):
            layers = _write_model(folder / "float32", gb=gb, dtype=dtype)
            ground.fetch(folder)
            manifest = read_manifest(folder / "base.json")
            _write_adapter(folder / "adapter", layers, manifest)
            _write_rows(folder / "tokens", manifest)
        extra = [part for setting in settings or () for part in ("--set", setting)]
        with console.progress("merging"):
            done = run(
                [
                    *("-m", "stages.merge", "adapter", "--manifest", "base.json", "--tokens", "tokens"),
                    *("--out", "merged", "--details", "merge.json"),
                    *overrides({"merge.adapters": None}),
                    *extra,
                ],
                folder=folder, log=folder / "merge.log", store=folder / "store",
            )  # fmt: skip
        shards = [path.stat().st_size for path in (folder / "float32").glob("model*.safetensors")]
        made = [path.stat().st_size for path in (folder / "merged").glob("model*.safetensors")]
        proof = json.loads((folder / "merge.json").read_text(encoding="utf-8"))
    in_float32 = sum(shards) * 4 / _BYTES[dtype]
    lines = [
        ("weights on the disk", f"{sum(shards) / GB:.2f}"),
        ("largest shard that is read", f"{max(shards) / GB:.2f}"),
        ("largest shard that is written", f"{max(made) / GB:.2f}"),
        ("weights in float32, as a processor computes", f"{in_float32 / GB:.2f}"),
        ("peak memory of merge", f"{done.peak_memory_bytes / GB:.2f}"),
        ("peak over weights in float32", f"{done.peak_memory_bytes / in_float32:.2f} ×"),
    ]
    console.table(f"Merge of {layers} layers in {done.seconds:.0f} s, survival {proof['survival']}", ("", "GB"), lines)


def _write_model(folder: Path, *, gb: float, dtype: str) -> int:
    """Write a random Llama of about this size, a few layers a shard; returns the number of its layers."""
    import mlx.core as mx

    kind = getattr(mx, dtype)
    layer = sum(rows * columns for rows, columns in _SHAPES.values()) * _BYTES[dtype]
    layers = max(ADAPTED + 1, round((gb * GB - VOCABULARY * WIDTH * _BYTES[dtype]) / layer))
    folder.mkdir()
    config = ground.llama_config(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        head_dim=HEAD_SIZE,
        vocab_size=VOCABULARY,
        torch_dtype=dtype,
    )
    (folder / "config.json").write_text(json.dumps(config))
    ground.write_tokenizer(folder)

    # Drawing them anew for each layer would take minutes.
    drawn = {shape: (0.02 * mx.random.normal(shape)).astype(kind) for shape in {*_SHAPES.values(), (VOCABULARY, WIDTH)}}

    def weights(start: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for i in range(start, min(start + LAYERS_A_SHARD, layers)):
            for name, shape in _SHAPES.items():
                found[f"model.layers.{i}.{name}.weight"] = mx.roll(drawn[shape], i, 0)
            for name in ("input_layernorm", "post_attention_layernorm"):
                found[f"model.layers.{i}.{name}.weight"] = mx.ones(WIDTH, kind)
        if start == 0:
            found["model.embed_tokens.weight"] = drawn[VOCABULARY, WIDTH]
            found["model.norm.weight"] = mx.ones(WIDTH, kind)
        return found

    starts = range(0, layers, LAYERS_A_SHARD)
    where: dict[str, str] = {}
    for number, start in enumerate(starts, 1):
        name, shard = f"model-{number:05d}-of-{len(starts):05d}.safetensors", weights(start)
        mx.save_safetensors(str(folder / name), shard, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return layers


def _write_adapter(folder: Path, layers: int, manifest: Manifest) -> None:
    """An adapter on q and v of the last layers, which the predictions show."""
    import mlx.core as mx

    from stages.lora import adapter_files
    from stages.lora.lora_config import LoraConfig

    keys = ("self_attn.q_proj", "self_attn.v_proj")
    arrays = {}
    for i in range(layers - ADAPTED, layers):
        for key in keys:
            out, into = _SHAPES[key]
            arrays[f"model.layers.{i}.{key}.lora_a"] = mx.random.normal((into, RANK)) / into**0.5
            arrays[f"model.layers.{i}.{key}.lora_b"] = mx.random.normal((RANK, out))
    config = LoraConfig(RANK, 2.0, 0.0, keys, ADAPTED, "lora")
    adapter_files.write(folder, arrays, config, base=manifest.weights_identity)


def _write_rows(folder: Path, manifest: Manifest) -> None:
    import numpy as np

    from stages.tokens.parquet import write_tokens
    from stages.tokens.row import TokenRow

    folder.mkdir()
    mask = np.arange(LENGTH) >= LENGTH // 2
    ids = np.random.default_rng(0).integers(2, VOCABULARY, (ROWS, LENGTH), dtype=np.int32)
    rows = [TokenRow(str(i), f"random:{i}", row, mask, int(mask.sum()), False) for i, row in enumerate(ids)]
    write_tokens(folder / "valid.parquet", rows, lambda: {"tokenizer": manifest.tokenizer_identity})


if __name__ == "__main__":
    from stages.model import blas

    blas.preload()
    console.main(benchmark)
