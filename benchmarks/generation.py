"""Greedy answers of one model beside other people's: this project, mlx-lm, transformers and llama.cpp, in float32.

`python -m benchmarks.generation [MODEL] [--peers PYTHON]`: `MODEL` is a folder like artifacts/merged, `PYTHON` that of
an environment with torch, transformers and xllamacpp. Each contender answers the same prompts in a process of its own,
in turns, without an end before the last token.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.processes import ROOT, run
from stages.cli import console

OURS, MLX_LM, TRANSFORMERS, LLAMA_CPP = "lorabuild", "mlx-lm", "transformers", "llama.cpp"
ROWS = (12, 1)


def generation(
    model: Annotated[Path, typer.Argument(help="The model's folder.")] = Path("artifacts/merged"),
    peers: Annotated[Path | None, typer.Option(help="The Python of an environment with the other libraries.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 3,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 96,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
) -> None:
    """Tokens a second of 12 answers at a time and of one, prompts included: median of the rounds, lowest, highest."""
    contenders = [OURS, MLX_LM, *([TRANSFORMERS, LLAMA_CPP] if peers else [])]
    found: dict[tuple[str, int], list[float]] = {(name, rows): [] for name in contenders for rows in ROWS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = {"model": str(model.resolve()), "prompt_tokens": prompt_tokens, "tokens": tokens, "rows": ROWS}
        if LLAMA_CPP in contenders:
            exported = ["-m", "stages.convert", str(model), "--to", "gguf", "--dtype", "f32", "--out", name + "/gguf"]
            run(exported, folder=ROOT, log=folder / "convert.log")
            spec["gguf"] = str(next((folder / "gguf").glob("*.gguf")))
        (folder / "spec.json").write_text(json.dumps(spec))
        for number in range(rounds):
            for contender in contenders:
                with console.progress(f"round {number + 1}: {contender}"):
                    python = sys.executable if contender in (OURS, MLX_LM) else str(peers)
                    arguments = ["-m", "benchmarks.generation_peer", contender, "spec.json", "rates.json"]
                    run(arguments, folder=folder, log=folder / "peer.log", python=python)
                for rows, rate in json.loads((folder / "rates.json").read_text()).items():
                    found[contender, int(rows)].append(rate)
    console.table(
        f"{tokens} tokens behind {prompt_tokens}: tokens a second",
        ("", *(f"{rows} at a time" if rows > 1 else "one" for rows in ROWS)),
        [(contender, *(_cell(found[contender, rows]) for rows in ROWS)) for contender in contenders],
    )
    if peers:
        shares = (statistics.median(found[OURS, r]) / statistics.median(found[TRANSFORMERS, r]) for r in ROWS)
        console.say("× transformers: " + ", ".join(f"{share:.2f}" for share in shares))


def _cell(rates: list[float]) -> Any:
    return f"{statistics.median(rates):.1f} [{min(rates):.1f}, {max(rates):.1f}]"


if __name__ == "__main__":
    console.main(generation)
