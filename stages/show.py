"""The result at a glance: is the fine-tuned model better on held-out rows, by how much, how sure is that."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stages.cli import console
from stages.cli.settings import settle_to_look
from stages.files.outputs import read_json

_REMEDY = "make it with: dvc repro"


def show(
    details: Annotated[Path, typer.Option(help="What evaluate wrote.")] = Path("artifacts/details/evaluate.json"),
    report: Annotated[Path, typer.Option(help="The page that report wrote.")] = Path("artifacts/report/index.html"),
) -> None:
    """Print what evaluate found, base model beside adapter: tables, then the sentence with its 95% interval."""
    settle_to_look()
    from stages.results import summary

    numbers = read_json(details, _REMEDY)
    try:
        tables, sentence, power = list(summary.shown(numbers)), numbers["sentence"], numbers["power"]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError):
        raise ValueError(f"{details}: not what evaluate writes; {_REMEDY}") from None
    for title, header, lines in tables:
        console.table(title, header, lines)
    console.say(sentence)
    if power:
        console.say(power)
    if difference := _difference(numbers.get("numerics")):
        console.note(difference)
    if report.exists():
        console.say(f"The answers, side by side, and all the rest: {report}")


def _difference(made: Any) -> str | None:
    """Say why a rebuild here can end in other bytes than these numbers; None if nothing is known that would."""
    from stages.model import numerics

    if not isinstance(made, dict) or made == (here := numerics.in_use()):
        return None
    return (
        f"computed with {numerics.describe(made)}; here computes {numerics.describe(here)}: "
        "a rebuild can differ in the last digits"
    )
