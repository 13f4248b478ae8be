"""Rows → the files of the splits, and what the ledger counts of each row."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from stages.corpus.duplicates import has_control
from stages.corpus.intake import Row
from stages.corpus.pool import Pool
from stages.corpus.split import Allocation
from stages.prepared.ledger import Ledger
from stages.prepared.row import PreparedRow
from stages.prepared.splits import SPLITS

COUNTED = ("characters", "normalized", "control_characters", "near_duplicates")


class SplitFiles:
    """train, valid and test.jsonl, open to write; rows without a split wait, and count as train's till then."""

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        self._ledger, self._stack = ledger, ExitStack()
        self._files = {
            name: self._stack.enter_context((folder / f"{name}.jsonl").open("w", encoding="utf-8", newline=""))
            for name in SPLITS
        }
        self._pool = self._stack.enter_context(Pool(folder / "pool.jsonl", COUNTED))

    def __enter__(self) -> SplitFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def write(self, row: Row, split: str | None, *, resembles: bool) -> None:
        """Write a row and count it."""
        counts = {
            "characters": len(row.text),
            "normalized": int(row.normalized),
            "control_characters": int(has_control(row.content)),
            "near_duplicates": int(resembles),
        }
        line = PreparedRow(row.id, row.place, **row.content, group=row.group, carried=row.carried).line()
        self._ledger.used(split or "train", **counts)
        if split is None:
            self._pool.add(line, row.point, counts)
        else:
            self._files[split].write(line)

    def allocate(self, allocation: Allocation) -> None:
        """Give the waiting rows their splits.

        Raises:
            ValueError: they do not suffice.
        """
        for split, line, counts in self._pool.allocate(allocation):
            self._files[split].write(line)
            self._ledger.move("train", split, **counts)
