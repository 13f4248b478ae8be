"""The result at a glance: what the adapter gained on held-out rows, and a few answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stages.cli import console


def show(
    metrics: Annotated[Path, typer.Option(help="What evaluate wrote.")] = Path("artifacts/metrics/evaluate.json"),
    samples: Annotated[Path, typer.Option(help="What generate wrote.")] = Path("artifacts/samples/samples.jsonl"),
    count: Annotated[int, typer.Option(min=0, help="Samples to show.")] = 3,
) -> None:
    """Print the metrics of base and adapter, and some prompts with both models' answers."""
    scores = json.loads(_read(metrics))
    console.table(
        f"Held-out rows: {scores['rows']:,}, of which the adapter predicts {scores['rows_improved']:,} better",
        ("", "base", "adapter"),
        ((name.replace("_", " "), value, scores["adapter"][name]) for name, value in scores["base"].items()),
    )
    answers = [json.loads(line) for line in _read(samples).splitlines()]
    for answer in answers[:count]:
        console.table("", ("", "text"), ((name, text.strip()) for name, text in answer.items()), numeric=False)
    console.say(f"All {len(answers)} samples: {samples.with_suffix('.md')}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; make it with: dvc repro") from None
