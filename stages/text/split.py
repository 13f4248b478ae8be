"""Which split a row belongs to: a pure function of its own text, so that new rows move no old ones."""

from __future__ import annotations

import hashlib

SPLITS = ("train", "valid", "test")


def row_id(text: str) -> str:
    """A stable name for a row: 16 hex digits of its text's BLAKE2b."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def assign(row: str, *, seed: int, valid_fraction: float, test_fraction: float) -> str:
    """The split of the row with this id.

    The id and the seed hash to a point in [0, 1); test lies at its start, valid after it, train takes the rest.
    """
    digest = hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=8).digest()
    point = int.from_bytes(digest, "big") / 2**64
    if point < test_fraction:
        return "test"
    return "valid" if point < test_fraction + valid_fraction else "train"
