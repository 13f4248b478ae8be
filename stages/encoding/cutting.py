"""A row with more tokens than `max_length` → token rows that fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.encoding import offsets
from stages.encoding.masks import Masked
from stages.tokens.row import TokenRow


@dataclass(frozen=True, slots=True)
class Cut:
    """A token row, and the characters of the text from its first trained token to its last."""

    row: TokenRow
    low: int
    high: int


def truncate(masked: Masked, encoding: Any, max_length: int, *, prefix: int) -> Iterator[Cut]:
    """All but the start of the prompt, and only when the prompt is gone, without the end of the answer.

    `encoding` is the row's with offsets; `prefix` counts the tokens that the tokenizer puts before a text.
    """
    made = masked.tokens.rendered
    # One token must precede the first of the answer, to predict it from.
    limit = max(offsets.first_token(encoding, made.answer, made.text) - 1, 0)
    first = min(len(masked.ids) - max_length, limit)
    kept = np.arange(first, first + max_length)
    if made.special and prefix:
        kept[0] = 0  # a model that was trained with BOS at the start is lost without it
    kept_mask = masked.mask[kept]
    kept_mask[0] = False
    if kept_mask.any():
        yield _cut(masked, encoding, masked.ids[kept], kept_mask, first, truncated=True)


def windows(masked: Masked, encoding: Any, max_length: int, *, overlap: int) -> Iterator[Cut]:
    """Windows over a text. What one repeats from the one before is context: no token is trained on twice."""
    first = number = 0
    overlap = max(overlap, 1)
    while True:
        kept = masked.mask[first : first + max_length].copy()
        kept[: overlap if first else 1] = False
        if kept.any():
            yield _cut(masked, encoding, masked.ids[first : first + len(kept)], kept, first, window=number)
            number += 1
        if first + max_length >= len(masked.ids):
            return
        first += max_length - overlap


def _cut(
    masked: Masked,
    encoding: Any,
    ids: np.ndarray,
    mask: np.ndarray,
    first: int,
    *,
    truncated: bool = False,
    window: int | None = None,
) -> Cut:
    """The token row of a cut row's tokens from `first` on, with the bytes of text that its mask covers."""
    made, row, trained = masked.tokens.rendered, masked.tokens.row, np.flatnonzero(mask)
    low = offsets.place(encoding, first + int(trained[0]), 0, len(made.text))
    high = offsets.place(encoding, first + int(trained[-1]), 1, len(made.text))
    size = sum(offsets.size(made.text[max(span.start, low) : min(span.text_end, high)]) for span in made.spans)
    name = row.id if window is None else f"{row.id}-{window}"
    return Cut(TokenRow(name, row.source, ids, mask, size, truncated, row.group, row.carried or {}), low, high)
