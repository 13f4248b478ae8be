"""Speed and memory by the rows' length, the vocabulary, the rank and the number of frozen layers.

On a random Llama and random rows of one length, the second half of each trained on: speed does not ask what is learned.
`python -m benchmarks.growth FOLDER SHAPE` makes the ground for one shape (as JSON) in a process of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import ground
from benchmarks.contenders import Contender, Figures, Ground
from benchmarks.processes import ROOT, run

MIDDLE = {"length": 256, "vocabulary": 16384, "rank": 8, "frozen": 8}
AXES = {
    "length": [128, 256, 512, 1024],
    "vocabulary": [4096, 16384, 65536],
    "rank": [8, 32, 128],
    "frozen": [0, 8, 24],
}
ADAPTED, WIDTH, INNER, HEADS, KEYS, HEAD_SIZE = 4, 256, 704, 4, 2, 64
BATCHES = 3  # an epoch


def shapes(*, ends_only: bool) -> dict[str, list[dict[str, int]]]:
    """The shapes along each axis, all others in the middle."""
    chosen = {axis: values[:: len(values) - 1] if ends_only else values for axis, values in AXES.items()}
    if ends_only:
        chosen["length"] = AXES["length"][-2:]  # one doubling
    return {axis: [MIDDLE | {axis: value} for value in values] for axis, values in chosen.items()}


def measure(
    folder: Path, field: list[Contender], *, ends_only: bool, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One run of each contender at each shape: axis, shape, bytes of weights, figures by contender."""
    found: list[dict[str, Any]] = []
    done: dict[str, dict[str, Any]] = {}
    for axis, points in shapes(ends_only=ends_only).items():
        for shape in points:
            key = json.dumps(shape)
            if key not in done:
                tell(f"growth: {axis} {shape[axis]}")
                place = folder / f"shape-{len(done)}"
                done[key] = _measure_shape(place, shape, field)
            found.append({"axis": axis, "shape": shape, **done[key]})
    return found


def _measure_shape(folder: Path, shape: dict[str, int], field: list[Contender]) -> dict[str, Any]:
    folder.mkdir(parents=True)
    spec = folder / "shape.json"
    spec.write_text(json.dumps(shape))
    run(["-m", "benchmarks.growth", str(folder / "ground"), str(spec)], folder=ROOT, log=folder / "ground.log")
    lora, training = lora_and_training(shape)
    work = Ground(folder / "ground", "answers", BATCHES, lora, training)
    figures: dict[str, Figures] = {}
    for number, contender in enumerate(field):
        place = folder / str(number)
        place.mkdir()
        figures[contender.name] = contender.run(work, place)
    weights = (folder / "ground" / "float32" / "model.safetensors").stat().st_size
    return {"weights_bytes": weights, "figures": {name: each.plain() for name, each in figures.items()}}


def lora_and_training(shape: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    return (
        ground.LORA | {"layers": ADAPTED, "rank": shape["rank"]},
        ground.TRAINING | {"max_length": shape["length"] + 1},
    )


def make(folder: Path, shape: dict[str, int]) -> None:
    """The ground for one shape."""
    import numpy as np

    from stages.tokens.row import TokenRow

    folder.mkdir()
    (folder / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    _write_model(folder / "float32", shape)
    ground.fetch(folder)
    rng = np.random.default_rng(0)
    mask = np.arange(shape["length"]) >= shape["length"] // 2

    def rows(count: int) -> list[TokenRow]:
        ids = rng.integers(2, shape["vocabulary"], (count, shape["length"]), dtype=np.int32)
        return [TokenRow(str(i), f"random:{i}", row, mask, int(mask.sum()), False) for i, row in enumerate(ids)]

    size = ground.TRAINING["batch_size"]
    ground.write_rows(folder, "answers", rows(BATCHES * size), rows(size))
    ground.write_start(folder, lora_and_training(shape)[0])


def _write_model(folder: Path, shape: dict[str, int]) -> None:
    import mlx.core as mx
    from mlx_lm.models import llama

    config = ground.llama_config(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=shape["frozen"] + ADAPTED,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        head_dim=HEAD_SIZE,
        vocab_size=shape["vocabulary"],
    )
    mx.random.seed(0)
    ground.write_random(folder, llama.Model(llama.ModelArgs.from_dict(config)), config)


if __name__ == "__main__":
    from stages.model import blas

    blas.preload()
    make(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
