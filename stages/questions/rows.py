"""A test row → a question: the tokens before its last answer, and that answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.tokens.row import TokenRow


@dataclass(frozen=True)
class Question:
    """A prompt as the model reads it, and the answer that its row has."""

    id: str
    source: str
    prompt: str
    prompt_ids: list[int]
    reference: str


def questions_of(rows: Sequence[TokenRow], tokenizer: Any, *, limit: int) -> tuple[list[Question], int]:
    """Questions of at most `limit` rows, and how many rows have none: all of their text is learned.

    Chosen by the rows' ids, which follow from their content: new rows do not exchange all of them. In a conversation
    the question ends before the last turn that is learned.
    """
    made = {index: question for index, row in enumerate(rows) if (question := _question(row, tokenizer))}
    chosen = sorted(sorted(made, key=lambda index: made[index].id)[:limit])
    return [made[index] for index in chosen], len(rows) - len(made)


def _question(row: TokenRow, tokenizer: Any) -> Question | None:
    trained = np.flatnonzero(row.loss_mask)
    if not len(trained):
        return None
    # The last run of trained tokens: nothing but trained tokens from its first to its last.
    breaks = np.flatnonzero(np.diff(trained) > 1)
    first, last = int(trained[breaks[-1] + 1 if len(breaks) else 0]), int(trained[-1])
    prompt_ids, answer_ids = row.input_ids[:first].tolist(), row.input_ids[first : last + 1].tolist()
    prompt = _text(tokenizer, prompt_ids, skip_special_tokens=False)
    if not _text(tokenizer, prompt_ids, skip_special_tokens=True).strip():
        return None  # BOS alone, or the one token that nothing precedes
    return Question(
        row.id, row.source, prompt, prompt_ids, _text(tokenizer, answer_ids, skip_special_tokens=True).strip()
    )


def _text(tokenizer: Any, ids: list[int], *, skip_special_tokens: bool) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    return text
