"""The rows of each update.

The order is a pure function of (lengths, batch size or budget, seed, epoch): nothing that happens in training
disturbs it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from typing import cast

import numpy as np

from stages.lora.batches import split

# Rows sorted by length within this many batches at a time: little padding, and still another mix every epoch.
_WINDOW_BATCHES = 32


def epoch_updates(
    lengths: Sequence[int],
    *,
    batch_size: int | None,
    batch_tokens: int | None,
    grad_accumulation: int,
    seed: int,
    epoch: int,
) -> list[np.ndarray]:
    """Each row's index exactly once, in updates of `grad_accumulation` batches of rows of like length.

    An update's rows are in the order in which `split` gives its batches again; the last of a window may have fewer.
    """
    rng = np.random.default_rng([seed, epoch])
    order, sizes = rng.permutation(len(lengths)), np.asarray(lengths)
    updates: list[np.ndarray] = []
    window = _rows_a_batch(lengths, batch_size=batch_size, batch_tokens=batch_tokens) * grad_accumulation
    window *= _WINDOW_BATCHES
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(sizes[part], kind="stable")]
        batches = split(sizes[part].tolist(), batch_size=batch_size, batch_tokens=batch_tokens)
        for i in range(0, len(batches), grad_accumulation):
            several = batches[i : i + grad_accumulation]
            updates.append(part[several[0].start : several[-1].stop])
    return [updates[i] for i in rng.permutation(len(updates))]


def _rows_a_batch(lengths: Sequence[int], *, batch_size: int | None, batch_tokens: int | None) -> int:
    """About how many rows are in a batch."""
    if batch_tokens is None:
        return cast(int, batch_size)
    return max(batch_tokens * len(lengths) // sum(lengths), 1)


class Updates:
    """The rows of update number n, for any n: epoch after epoch."""

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int | None,
        batch_tokens: int | None,
        grad_accumulation: int,
        seed: int,
    ) -> None:
        self._of_epoch = partial(
            epoch_updates,
            lengths,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            grad_accumulation=grad_accumulation,
            seed=seed,
        )
        self._ends: list[int] = []  # updates up to the end of each epoch; with a budget, one may have more than another
        self._latest: tuple[int, list[np.ndarray]] = (-1, [])

    def in_epochs(self, epochs: int) -> int:
        """The number of updates in the first `epochs` epochs."""
        while len(self._ends) < epochs:
            self._ends.append((self._ends or [0])[-1] + len(self._epoch(len(self._ends))))
        return self._ends[epochs - 1] if epochs else 0

    def rows(self, step: int) -> np.ndarray:
        """The indices of the rows of update number `step`, counted from 1."""
        while self.in_epochs(len(self._ends)) < step:
            self.in_epochs(len(self._ends) + 1)
        epoch = bisect_left(self._ends, step)
        return self._epoch(epoch)[step - 1 - self.in_epochs(epoch)]

    def epoch(self, step: int) -> int:
        """The epoch, counted from 0, of an update whose rows were asked for."""
        return bisect_left(self._ends, step)

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        if self._latest[0] != epoch:
            self._latest = (epoch, self._of_epoch(epoch=epoch))
        return self._latest[1]
