"""Which split a row belongs to: a pure function of its own text or group, so that new rows move no old ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np


def point(key: str, *, seed: int) -> int:
    """The 64-bit point that a row's id (or its group) and the seed hash to."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest(), "big")


def assign(place: int, *, valid_fraction: float, test_fraction: float) -> str:
    """The split of a point: test lies at the start of the range, valid after it, train takes the rest."""
    share = place / 2**64
    if share < test_fraction:
        return "test"
    return "valid" if share < test_fraction + valid_fraction else "train"


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
