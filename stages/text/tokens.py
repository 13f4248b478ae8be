"""Prepared rows → token ids and the loss mask.

The mask comes from character offsets of the whole text's tokens, never from tokenizing the prompt apart: a token may
span the border between prompt and completion, and then it is trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

_BATCH_ROWS = 256  # rows the tokenizer encodes at a time, on all cores


@dataclass(frozen=True)
class PreparedRow:
    """A row of data/prepared."""

    id: str
    source: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class TokenRow:
    """A row of data/tokens. `loss_mask[i]` says whether predicting `input_ids[i]` is trained on and scored."""

    id: str
    source: str
    input_ids: np.ndarray  # int32, (L,)
    loss_mask: np.ndarray  # bool, (L,)
    trained_bytes: int  # UTF-8 bytes of the text that the mask covers
    truncated: bool


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The model directory's tokenizer, in its fast form, which knows character offsets.

    Raises:
        ValueError: there is none, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {directory.name} has no fast form (tokenizer.json), which offsets need")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {directory.name} names no EOS token, without which generation never stops")
    return tokenizer


def encode(
    rows: Iterable[PreparedRow], tokenizer: Any, *, max_length: int, train_on: Literal["all", "completion"]
) -> Iterator[TokenRow]:
    """Token rows of at most `max_length` tokens, in the order of `rows`.

    A longer row loses the start of its prompt, and only when the prompt is gone, the end of its completion.
    """
    backend, eos = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    for batch in _batches(rows, _BATCH_ROWS):
        texts = [row.prompt + row.completion for row in batch]
        for row, text, encoding in zip(batch, texts, backend.encode_batch(texts), strict=True):
            ids, spans = list(encoding.ids), list(encoding.offsets)
            if not ids or ids[-1] != eos:
                ids, spans = [*ids, eos], [*spans, (len(text), len(text))]
            start = 0 if train_on == "all" else len(row.prompt)
            # Special tokens that the tokenizer adds have an empty span: they are context, never a target. EOS is one.
            mask = [end > start and end > begin for begin, end in spans[:-1]] + [True]
            kept = _window(mask, max_length)
            trained = [span for span, on in zip(spans[kept], mask[kept], strict=True) if on]
            yield TokenRow(
                row.id,
                row.source,
                np.array(ids[kept], dtype=np.int32),
                np.array(mask[kept], dtype=bool),
                len(text[max(start, trained[0][0]) : trained[-1][1]].encode()),
                truncated=len(ids) > max_length,
            )


def _window(mask: list[bool], max_length: int) -> slice:
    """The tokens of a row to keep: of an overlong one, all but the start of its prompt, then all but its end."""
    # One token must precede the first trained one, to predict it from.
    prompt = max(mask.index(True) - 1, 0)
    first = min(max(len(mask) - max_length, 0), prompt)
    return slice(first, first + max_length)


def _batches(rows: Iterable[PreparedRow], size: int) -> Iterator[Sequence[PreparedRow]]:
    batch: list[PreparedRow] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
