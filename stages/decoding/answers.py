"""Tables of prompts and answers: `prompt` and `prompt_ids`, then `base`, `base_tokens` and `base_stopped`, say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.nn as nn
import pyarrow as pa

from stages.decoding.decode import Answer, answer_all
from stages.params import schema


def answers_of(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    options: schema.Generate,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """A model's answers, in the order of the prompts; `advance` hears of each one that is done."""
    answers: dict[int, Answer] = {}
    for index, answer in answer_all(model, tokenizer, prompts, **options.model_dump()):
        answers[index] = answer
        advance(1)
    return [answers[index] for index in range(len(prompts))]


def with_answers(table: Any, name: str, answers: Sequence[Answer]) -> Any:
    """The table with the columns of one more model."""
    columns = {
        name: pa.array([answer.text for answer in answers], pa.string()),
        f"{name}_tokens": pa.array([answer.tokens for answer in answers], pa.int64()),
        f"{name}_stopped": pa.array([answer.stopped for answer in answers], pa.bool_()),
    }
    for column, values in columns.items():
        table = table.append_column(column, values)
    return table
