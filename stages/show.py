"""The result at a glance: what the adapter gained on held-out rows, and a few answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from stages.cli import console
from stages.files.outputs import read_json

_REMEDY = "make it with: dvc repro"


def show(
    metrics: Annotated[Path, typer.Option(help="What evaluate wrote.")] = Path("artifacts/metrics/evaluate.json"),
    samples: Annotated[Path, typer.Option(help="What generate wrote.")] = Path("artifacts/samples/samples.jsonl"),
    count: Annotated[int, typer.Option(min=0, help="Samples to show.")] = 3,
) -> None:
    """Print the metrics of base and adapter, and some prompts with both models' answers."""
    scores, answers = read_json(metrics, _REMEDY), _read_samples(samples)
    try:
        title = f"Held-out rows: {scores['rows']:,}, of which the adapter predicts {scores['rows_improved']:,} better"
        rows = [(name.replace("_", " "), value, scores["adapter"][name]) for name, value in scores["base"].items()]
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{metrics}: not what evaluate writes; {_REMEDY}") from None
    console.table(title, ("", "base", "adapter"), rows)
    for answer in answers[:count]:
        console.table("", ("", "text"), ((name, text.strip()) for name, text in answer.items()), numeric=False)
    console.say(f"All {len(answers)} samples: {samples.with_suffix('.md')}")


def _read_samples(path: Path) -> list[dict[str, str]]:
    """The samples that generate wrote, name → text."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {_REMEDY}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: damaged: not UTF-8; {_REMEDY}") from None
    return [_sample(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _sample(line: str, place: str) -> dict[str, str]:
    try:
        sample: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"{place}: damaged: not JSON; {_REMEDY}") from None
    if not isinstance(sample, dict) or not all(isinstance(text, str) for text in sample.values()):
        raise ValueError(f"{place}: not a sample that generate writes; {_REMEDY}")
    return sample
