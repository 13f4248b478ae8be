"""Rows that wait until all are known: then held-out splits take their numbers of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from stages.corpus.split import Allocation


class Pool:
    """Lines in a file, which is gone in the end; in memory, each line's point and its counts."""

    def __init__(self, path: Path, counted: Sequence[str]) -> None:
        self._path, self._file = path, path.open("w", encoding="utf-8", newline="")
        self._points, self._counts = array("Q"), {name: array("I") for name in counted}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        self._path.unlink()

    def add(self, line: str, point: int, counts: Mapping[str, int]) -> None:
        """Let a row wait."""
        self._file.write(line)
        self._points.append(point)
        for name, column in self._counts.items():
            column.append(counts[name])

    def allocate(self, allocation: Allocation) -> Iterator[tuple[str, str, dict[str, int]]]:
        """Each row's split, line and counts.

        Raises:
            ValueError: the rows do not suffice.
        """
        self._file.close()
        last = allocation.borders(np.frombuffer(self._points, dtype=np.uint64))
        with self._path.open(encoding="utf-8", newline="") as lines:
            for line, point, *counts in zip(lines, self._points, *self._counts.values(), strict=True):
                goal = "test" if point <= last["test"] else "valid" if point <= last["valid"] else "train"
                yield goal, line, dict(zip(self._counts, counts, strict=True))
