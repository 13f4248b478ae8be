"""Each row's score by one model, kept as columns of a table: `base_loss` and `base_correct`, say.

A row's loss is the sum over its trained tokens, in nats; the number of those tokens, and of the bytes of their text,
stand beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.nn as nn
import pyarrow as pa

from stages.lora.frozen import FrozenLayers
from stages.scoring.ranks import Ranks
from stages.scoring.score import Score, gather_scores, score_rows
from stages.tokens.row import TokenRow


def score_all(
    model: nn.Module,
    rows: Sequence[TokenRow],
    *,
    batch_size: int,
    ranks: Ranks,
    frozen: FrozenLayers | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Score]:
    """Each row's score, in the order of the rows, whichever rank scored it; `advance` hears of each row done here."""
    own = ranks.shard([len(row.input_ids) for row in rows])
    scored = {}
    for index, score in score_rows(model, [rows[i] for i in own], batch_size=batch_size, frozen=frozen):
        scored[own[index]] = score
        advance(1)
    return gather_scores(scored, rows=len(rows), ranks=ranks)


def rows_table(rows: Sequence[TokenRow]) -> Any:
    """A table with a line for each row, no scores yet."""
    return pa.table(
        {
            "id": [row.id for row in rows],
            "source": [row.source for row in rows],
            "group": pa.array([row.group for row in rows], pa.string()),
            "carried": pa.array([list(row.carried.items()) for row in rows], pa.map_(pa.string(), pa.string())),
            "tokens": [int(row.loss_mask.sum()) for row in rows],
            "bytes": [row.trained_bytes for row in rows],
        }
    )


def with_scores(table: Any, name: str, scores: Sequence[Score]) -> Any:
    """The table with the columns of one more model."""
    table = table.append_column(f"{name}_loss", pa.array([score.loss_sum for score in scores], pa.float64()))
    return table.append_column(f"{name}_correct", pa.array([score.correct for score in scores], pa.int64()))
