"""Which rows make up which update, and rows → padded arrays.

The order is a pure function of (lengths, batch size, seed, epoch): nothing that happens during training disturbs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from stages.lora.prefix import FrozenPrefix, States
from stages.text.tokens import TokenRow

# Rows sorted by length within this many batches at a time: little padding, and still another mix every epoch.
_WINDOW_BATCHES = 32


@dataclass(frozen=True)
class Batch:
    """Rows padded at their end, inputs one position ahead of targets.

    `trained_N` indexes the flattened (B · L) positions whose targets count; `rows_N` tells the row of each. With
    `states`, the model starts from what its lowest layers put out for these inputs.
    """

    inputs_BxL: mx.array
    targets_N: mx.array
    trained_N: mx.array
    rows_N: np.ndarray
    real_tokens: int
    states: States | None = None

    @property
    def trained_tokens(self) -> int:
        return len(self.rows_N)

    @property
    def padded_tokens(self) -> int:
        rows, length = self.inputs_BxL.shape
        return rows * (length + 1) - self.real_tokens


def epoch_batches(lengths: Sequence[int], *, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Each row's index exactly once, in batches of rows of like length; one batch may be shorter than the others."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    batches: list[np.ndarray] = []
    window = batch_size * _WINDOW_BATCHES
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(np.asarray(lengths)[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def sorted_batches(lengths: Sequence[int], *, batch_size: int) -> list[np.ndarray]:
    """Each row's index exactly once, by length: for scoring, where the order does not matter."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def collate(rows: Sequence[TokenRow], prefix: FrozenPrefix | None = None) -> Batch:
    """Pad rows of at least two tokens each to a batch; a `prefix` puts their states to it."""
    longest = max(len(row.input_ids) for row in rows)
    tokens = np.zeros((len(rows), longest), dtype=np.int32)
    mask = np.zeros((len(rows), longest), dtype=bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row.input_ids)] = row.input_ids
        mask[i, : len(row.input_ids)] = row.loss_mask
    # The first token has nothing before it to be predicted from.
    targets, trained = tokens[:, 1:], np.flatnonzero(mask[:, 1:])
    return Batch(
        inputs_BxL=mx.array(tokens[:, :-1]),
        targets_N=mx.array(targets.reshape(-1)[trained]),
        trained_N=mx.array(trained),
        rows_N=trained // (longest - 1),
        real_tokens=sum(len(row.input_ids) for row in rows),
        states=None if prefix is None else prefix.states(rows),
    )
