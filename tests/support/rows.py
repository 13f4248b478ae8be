"""Token rows for tests of the numerical core."""

from __future__ import annotations

import numpy as np

from stages.lora.batches import Batch, collate
from stages.tokens.row import TokenRow


def token_row(number: int, length: int, *, trained: int, seed: int = 0) -> TokenRow:
    """A row of random bytes whose last `trained` tokens count."""
    rng = np.random.default_rng([seed, number])
    mask = np.zeros(length, dtype=bool)
    mask[-trained:] = True
    return TokenRow(
        f"row{number}", f"rows.jsonl:{number}", rng.integers(0, 256, length).astype(np.int32), mask, trained, False
    )


def one_by_one(rows: list[TokenRow]) -> list[Batch]:
    """A batch for each row."""
    return [collate([row]) for row in rows]
