"""Rows → batches: padded arrays, with as little padding as can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from stages.lora.frozen import FrozenLayers, States
from stages.tokens.row import TokenRow

# Lengths are padded to a multiple of this where every shape must be compiled.
_LENGTHS = 32


@dataclass(frozen=True)
class Batch:
    """Rows padded at their end, inputs one position ahead of targets.

    `trained_N` indexes the flattened (B · L) positions whose targets count; `rows_N` tells the row of each. Where N is
    padded too, the positions that stand in for trained ones have weight 0, and no row. With `states`, the model starts
    from what its lowest layers put out for these inputs.
    """

    inputs_BxL: mx.array
    targets_N: mx.array
    trained_N: mx.array
    weights_N: mx.array
    rows_N: np.ndarray
    real_tokens: int
    states: States | None = None

    @property
    def arrays(self) -> dict[str, mx.array]:
        """The arrays that enter a computation, by name."""
        arrays = {name: getattr(self, name) for name in ("inputs_BxL", "targets_N", "trained_N", "weights_N")}
        return arrays if self.states is None else arrays | {"hidden_BxLxD": self.states.hidden_BxLxD}

    @classmethod
    def of_arrays(cls, arrays: dict[str, mx.array], *, layers: int) -> Batch:
        """A batch to compute with, of what `arrays` gave; `layers` are those that its states stand for, if any."""
        arrays = dict(arrays)
        hidden_BxLxD = arrays.pop("hidden_BxLxD", None)
        states = None if hidden_BxLxD is None else States(layers, hidden_BxLxD)
        return cls(**arrays, rows_N=np.empty(0, dtype=int), real_tokens=0, states=states)

    @property
    def trained_tokens(self) -> int:
        return len(self.rows_N)

    @property
    def padded_tokens(self) -> int:
        rows, length = self.inputs_BxL.shape
        return rows * (length + 1) - self.real_tokens


def split(lengths: Sequence[int], *, batch_size: int | None, batch_tokens: int | None) -> list[slice]:
    """Consecutive rows as batches: of `batch_size` rows, and of as many as fit a budget of tokens, padding included.

    A row longer than the budget is a batch by itself.
    """
    most_rows, most_tokens = batch_size or math.inf, batch_tokens or math.inf
    batches: list[slice] = []
    start = longest = 0
    for i, length in enumerate(lengths):
        longest, rows = max(longest, length), i + 1 - start
        if rows > 1 and (rows > most_rows or longest * rows > most_tokens):
            batches.append(slice(start, i))
            start, longest = i, length
    return [*batches, slice(start, len(lengths))] if len(lengths) else []


def sorted_batches(
    lengths: Sequence[int], *, batch_size: int | None, batch_tokens: int | None = None
) -> list[np.ndarray]:
    """Each row's index exactly once, by length: for scoring, where the order does not matter."""
    sizes = np.asarray(lengths)
    order = np.argsort(sizes, kind="stable")
    batches = split(sizes[order].tolist(), batch_size=batch_size, batch_tokens=batch_tokens)
    return [order[batch] for batch in batches]


def collate(rows: Sequence[TokenRow], frozen: FrozenLayers | None = None, *, few_shapes: bool = False) -> Batch:
    """Pad rows of at least two tokens each to a batch, with the output of the `frozen` layers, if there are any.

    With `few_shapes` it is padded so that many batches have the same shape.
    """
    longest = max(len(row.input_ids) for row in rows)
    if few_shapes:
        longest = -(-(longest - 1) // _LENGTHS) * _LENGTHS + 1
    # One more than L: inputs are all tokens but the last, targets all but the first.
    tokens_BxL1 = np.zeros((len(rows), longest), dtype=np.int32)
    mask_BxL1 = np.zeros((len(rows), longest), dtype=bool)
    for i, row in enumerate(rows):
        tokens_BxL1[i, : len(row.input_ids)] = row.input_ids
        mask_BxL1[i, : len(row.input_ids)] = row.loss_mask
    # The first token has nothing before it to be predicted from.
    targets_BL, trained_N = tokens_BxL1[:, 1:].reshape(-1), np.flatnonzero(mask_BxL1[:, 1:])
    padding = _rounded_up(len(trained_N)) - len(trained_N) if few_shapes else 0
    padded_N = np.pad(trained_N, (0, padding))
    return Batch(
        inputs_BxL=mx.array(tokens_BxL1[:, :-1]),
        targets_N=mx.array(targets_BL[padded_N]),
        trained_N=mx.array(padded_N),
        weights_N=mx.array(np.arange(len(padded_N)) < len(trained_N), dtype=mx.float32),
        rows_N=trained_N // (longest - 1),
        real_tokens=sum(len(row.input_ids) for row in rows),
        states=None if frozen is None else frozen.states(rows, length=longest - 1),
    )


def _rounded_up(count: int) -> int:
    """To a number of four binary digits and zeros: eight of them from one power of two to the next."""
    unit = 1 << max(count.bit_length() - 4, 0)
    return -(-count // unit) * unit
