"""Reading a run's figures: by kind of loss and contender, the runs of all rounds."""

from __future__ import annotations

import statistics
from typing import Any

Entry = dict[str, Any]  # of a contender: `runs`, `same_updates`, perhaps `loss` and `untrained`


def ours(entries: dict[str, Entry]) -> Entry | None:
    """This project with every saving that leaves the updates as they are."""
    found = [entry for name, entry in entries.items() if name.startswith("(e)") and entry["same_updates"]]
    return found[-1] if found else None


def of(entries: dict[str, Entry], letter: str) -> Entry | None:
    """The first contender of this letter, as in `(b)`."""
    return next((entry for name, entry in entries.items() if name.startswith(letter)), None)


def spread(entry: Entry, key: str) -> tuple[float, float, float]:
    """Median, lowest and highest of the rounds."""
    values = [run[key] for run in entry["runs"]]
    return statistics.median(values), min(values), max(values)


def median(entry: Entry, key: str) -> float:
    return spread(entry, key)[0]


def disagreement(entry: Entry, plain: Entry) -> float:
    """The largest relative difference between the losses of two contenders' updates."""
    pairs = zip(entry["runs"][0]["losses"], plain["runs"][0]["losses"], strict=True)
    return max(abs(loss / other - 1) for loss, other in pairs)
