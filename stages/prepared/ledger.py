"""The ledger of rows: per split, rows in = rows used + rows dropped, by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from stages.prepared.splits import SPLITS


class Ledger:
    """Counters per split, whose names are fixed beforehand so that metrics keep their names from run to run."""

    def __init__(self, reasons: Iterable[str], others: Iterable[str] = ()) -> None:
        self.reasons, self.others = tuple(reasons), tuple(others)
        self.splits: Mapping[str, Counter[str]] = {split: Counter() for split in SPLITS}

    def used(self, split: str, /, **others: int) -> None:
        """Count a row that goes into a split."""
        self.splits[split]["rows_in"] += 1
        self.splits[split]["rows_used"] += 1
        self.add(split, **others)

    def dropped(self, split: str, reason: str) -> None:
        """Count a row that does not."""
        if reason not in self.reasons:
            raise KeyError(reason)
        self.splits[split]["rows_in"] += 1
        self.splits[split][f"dropped_{reason}"] += 1

    def add(self, split: str, /, **others: int) -> None:
        """Count something else."""
        for name, count in others.items():
            if name not in self.others:
                raise KeyError(name)
            self.splits[split][name] += count

    def move(self, origin: str, split: str, /, **others: int) -> None:
        """Turn a used row of one split into one of another."""
        for name, count in {"rows_in": 1, "rows_used": 1, **others}.items():
            self.splits[origin][name] -= count
            self.splits[split][name] += count

    def figures(self, split: str) -> dict[str, int]:
        """All counters of a split, or of `all` splits together.

        Raises:
            ValueError: they do not add up, which would be a mistake of this program.
        """
        parts = list(self.splits.values()) if split == "all" else [self.splits[split]]
        names = ["rows_in", "rows_used", *(f"dropped_{reason}" for reason in self.reasons), *self.others]
        figures = {name: sum(part[name] for part in parts) for name in names}
        lost = figures["rows_in"] - sum(figures[name] for name in names[1 : 2 + len(self.reasons)])
        if lost:
            raise ValueError(f"the {split} ledger does not add up: {lost} rows are unaccounted for")
        return figures
