"""The split that a row belongs to: a pure function of its own text or group, so that new rows move no old ones."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from stages.params.schema import Prepare


def point(key: str, *, seed: int) -> int:
    """The 64-bit point that a row's id (or its group) and the seed hash to."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Allocation:
    """The shares of the held-out splits in the rows without a split of their own: fractions, or numbers of rows."""

    fractions: Mapping[str, float]
    rows: Mapping[str, int]

    @classmethod
    def under(cls, options: Prepare, provided: Collection[str | None]) -> Allocation:
        """The shares that the parameters set; 0 for a split that has files of its own."""
        fractions = {"valid": options.valid_fraction, "test": options.test_fraction}
        rows = {"valid": options.valid_rows, "test": options.test_rows}
        return cls(
            {name: 0 if name in provided else value or 0 for name, value in fractions.items()},
            {name: 0 if name in provided else value or 0 for name, value in rows.items()},
        )

    @property
    def by_count(self) -> bool:
        """Numbers of rows can be had only when all rows are known."""
        return any(self.rows.values())

    def wants(self, name: str) -> bool:
        """True if a split should have rows of those without a split."""
        return name == "train" or bool(self.fractions[name] or self.rows[name])

    def split_of(self, place: int) -> str:
        """The split of a point by fractions: test at the start of the range, valid after it, train the rest."""
        share = place / 2**64
        if share < self.fractions["test"]:
            return "test"
        return "valid" if share < self.fractions["test"] + self.fractions["valid"] else "train"

    def borders(self, points: np.ndarray) -> Mapping[str, int]:
        """The last point of test and of valid by numbers of rows, or -1.

        Raises:
            ValueError: the rows do not suffice.
        """
        wanted = {name: self.rows[name] or round(self.fractions[name] * len(points)) for name in self.rows}
        return borders(points, **wanted)


def borders(points: np.ndarray, *, valid: int, test: int) -> Mapping[str, int]:
    """The last point of test and of valid, so that each gets the wanted number of rows, or none (-1).

    Rows of one group share a point and stay together: a split takes whole groups until it has enough.

    Raises:
        ValueError: the rows do not suffice.
    """
    unique, counts = np.unique(points, return_counts=True)
    reached = np.concatenate([[0], np.cumsum(counts)])
    last, taken = {}, 0
    for name, wanted in (("test", test), ("valid", valid)):
        if wanted == 0:
            last[name] = int(unique[taken - 1]) if taken else -1
            continue
        end = int(np.searchsorted(reached, reached[taken] + wanted))
        if end >= len(unique):
            raise ValueError(
                f"{wanted} rows for {name} and some to train on need more than the {len(points)} there are; "
                f"lower prepare.{name}_rows or add rows"
            )
        last[name], taken = int(unique[end - 1]), end
    return last
