"""Scores of a model on rows: loss, perplexity, bits per byte, token accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from stages.lora.batches import Batch, collate, sorted_batches
from stages.lora.frozen import FrozenLayers
from stages.lora.loss import chunk_scores
from stages.scoring.ranks import Ranks
from stages.tokens.row import TokenRow


@dataclass(frozen=True)
class Score:
    """Sums over the trained tokens of one row or of many."""

    loss_sum: float  # nats
    correct: int  # tokens that were the likeliest
    tokens: int
    trained_bytes: int

    def __add__(self, other: Score) -> Score:
        return Score(
            self.loss_sum + other.loss_sum,
            self.correct + other.correct,
            self.tokens + other.tokens,
            self.trained_bytes + other.trained_bytes,
        )

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Comparable across tokenizers: the text's bits under the model, over its bytes in UTF-8."""
        return self.loss_sum / math.log(2) / self.trained_bytes

    @property
    def token_accuracy(self) -> float:
        return self.correct / self.tokens


NOTHING = Score(0.0, 0, 0, 0)


def score_batch(model: nn.Module, batch: Batch) -> Score:
    """The sums of a whole batch, without its bytes."""
    losses_N, correct_N = _score_tokens(model, batch)
    return Score(float(losses_N.sum()), int(correct_N.sum()), batch.trained_tokens, 0)


def score_rows(
    model: nn.Module, rows: Sequence[TokenRow], *, batch_size: int, frozen: FrozenLayers | None = None
) -> Iterator[tuple[int, Score]]:
    """The sums of each row by a model in evaluation mode, as (index, score), in no particular order."""
    for indices in sorted_batches([len(row.input_ids) for row in rows], batch_size=batch_size):
        batch = collate([rows[i] for i in indices], frozen)
        losses_N, correct_N = _score_tokens(model, batch)
        for position, index in enumerate(indices):
            mine = batch.rows_N == position
            yield (
                int(index),
                Score(
                    float(losses_N[mine].sum()), int(correct_N[mine].sum()), int(mine.sum()), rows[index].trained_bytes
                ),
            )


def gather_scores(scored: Mapping[int, Score], *, rows: int, ranks: Ranks) -> list[Score]:
    """Every row's score on every rank, from what each rank scored, by the row's index."""
    own_Rx4 = [astuple(scored.get(index, NOTHING)) for index in range(rows)]
    sums = ranks.sum([value for score in own_Rx4 for value in score])
    return [Score(sums[i], *map(int, sums[i + 1 : i + 4])) for i in range(0, len(sums), 4)]


def _score_tokens(model: nn.Module, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    losses, correct = [], []
    for losses_n, correct_n in chunk_scores(model, batch):
        mx.eval(losses_n, correct_n)
        # Summed in double precision, in which the order of many terms does not show.
        losses.append(np.array(losses_n).astype(np.float64))
        correct.append(np.array(correct_n))
    return np.concatenate(losses), np.concatenate(correct)
