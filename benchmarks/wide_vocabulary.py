"""Models whose vocabulary is most of them: this project's trainer beside PEFT, on the same rows.

`python -m benchmarks.wide_vocabulary [--shape gemma3-270m|qwen] [--peers PYTHON]` writes a random model of that shape
and random rows as long as WikiSQL's, and trains on them in turns. Speed does not ask what is learned. With
`--ground FOLDER` it makes the ground alone, in a process of its own: this one measures others and stays small.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import ground
from benchmarks.contenders import PLAIN, SAVINGS, Figures, Ground, ours, peft
from benchmarks.processes import ROOT, run
from stages.cli import console
from stages.model import blas

LORA = ground.LORA | {"modules": [*ground.ATTENTION, *ground.MLP]}
TRAINING = ground.TRAINING | {"max_length": 128}
ROW_TOKENS, ANSWER_TOKENS = (60, 120), 20
_COMMON = {
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
SHAPES: dict[str, dict[str, Any]] = {
    "gemma3-270m": _COMMON
    | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    # Qwen 2.5 0.5B's.
    "qwen": _COMMON
    | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
}


class Shape(StrEnum):
    GEMMA = "gemma3-270m"
    QWEN = "qwen"


def wide_vocabulary(
    shape: Annotated[Shape, typer.Option(help="Whose layers and vocabulary.")] = Shape.GEMMA,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 2,
    batches: Annotated[int, typer.Option(min=2, help="Updates an epoch; each run is two epochs.")] = 8,
    peers: Annotated[Path | None, typer.Option(help="The Python of an environment with torch and peft.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Work in this new folder and leave it there.")] = None,
    make_in: Annotated[Path | None, typer.Option("--ground", hidden=True)] = None,
) -> None:
    """Speed, memory and the time until the first update: best of all rounds, and this project's over PEFT's."""
    if make_in is not None:
        blas.preload()
        make(make_in, SHAPES[shape], batches)
        return
    if keep is not None:
        keep.mkdir(parents=True)
    with nullcontext(str(keep.resolve())) if keep else tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with console.progress("preparing"):
            child = ["-m", "benchmarks.wide_vocabulary", "--shape", shape.value, "--batches", str(batches)]
            run([*child, "--ground", str(folder / "ground")], folder=ROOT, log=folder / "ground.log")
        work = Ground(folder / "ground", "answers", batches, LORA, TRAINING)
        found: dict[str, list[Figures]] = {"lorabuild": [], **({"PEFT": []} if peers else {})}
        for number in range(rounds):
            for contender, runs in found.items():
                place = folder / f"{contender}-{number}"
                place.mkdir()
                with console.progress(f"round {number + 1}: {contender}"):
                    runs.append(_measured(contender, work, place, str(peers)))
    lines = [_line(contender, best(runs)) for contender, runs in found.items()]
    if peers:
        ours_best, theirs = best(found["lorabuild"]), best(found["PEFT"])
        lines.append(("lorabuild / PEFT", *(f"{a / b:.2f}" for a, b in zip(ours_best, theirs, strict=True))))
        worst = max(abs(a / b - 1) for a, b in zip(found["lorabuild"][0].losses, found["PEFT"][0].losses, strict=True))
        console.say(f"the losses of all updates agree to {worst:.1e}")
    header = ("trainer", "tokens/s, first epoch", "second epoch", "peak MB", "first update, s")
    console.table(f"{shape.value}, {2 * batches} updates, best of {rounds}", header, lines)


def _measured(contender: str, work: Ground, place: Path, peers: str) -> Figures:
    if contender == "PEFT":
        return peft(work, place, python=peers)
    settings = dict(PLAIN)
    for saving in SAVINGS.values():
        settings |= saving
    return ours(settings | {"model.cache_frozen": "auto"})(work, place)


def best(runs: Sequence[Figures]) -> tuple[float, float, float, float]:
    """Tokens a second in the first epoch and the second, peak bytes, seconds to the first update."""
    return (
        max(run.first_epoch for run in runs),
        max(run.second_epoch for run in runs),
        min(run.peak_memory_bytes for run in runs),
        min(run.seconds_to_first_update for run in runs),
    )


def _line(contender: str, figures: tuple[float, float, float, float]) -> tuple[str, ...]:
    first, second, memory, start = figures
    return contender, f"{first:.0f}", f"{second:.0f}", f"{memory / 1e6:,.0f}", f"{start:.1f}"


def make(folder: Path, config: dict[str, Any], batches: int) -> None:
    """The ground: a random model, and rows whose last tokens are trained on."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import _get_classes

    from stages.tokens.row import TokenRow

    folder.mkdir()
    (folder / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    mx.random.seed(0)
    kind, arguments = _get_classes(config)
    model = kind(arguments.from_dict(config))
    if config["tie_word_embeddings"]:
        model.pop("lm_head", None)
    ground.write_random(folder / "float32", model, config)
    ground.fetch(folder)
    rng = np.random.default_rng(0)

    def row(i: int) -> TokenRow:
        length = int(rng.integers(*ROW_TOKENS, endpoint=True))
        ids = rng.integers(2, config["vocab_size"], length, dtype=np.int32)
        return TokenRow(
            str(i), f"random:{i}", ids, np.arange(length) >= length - ANSWER_TOKENS, ANSWER_TOKENS, truncated=False
        )

    size = TRAINING["batch_size"]
    ground.write_rows(folder, "answers", [row(i) for i in range(batches * size)], [row(i) for i in range(size)])
    ground.write_start(folder, LORA)


if __name__ == "__main__":
    console.main(wide_vocabulary)
