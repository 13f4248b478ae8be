"""General text → token rows that are scored whole, to see how much a fine-tune forgets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from stages.readers.rows import RawRow
from stages.templating.tokenizer import TextTokenizer
from stages.tokens.row import TokenRow


def general_rows(raw: Iterable[RawRow], tokenizer: Any, *, max_length: int) -> Iterator[tuple[str, TokenRow]]:
    """The language that each row names (or an empty text) and its token row: all but the first token count.

    Raises:
        ValueError: a row without `text`, or with a text of less than two tokens.
    """
    encoder = TextTokenizer(tokenizer)
    for row in raw:
        text, language = row.fields.get("text"), row.fields.get("language", "")
        if not isinstance(text, str) or not isinstance(language, str):
            raise ValueError(f'{row.place}: general text needs {{"text": "…"}}, and perhaps a "language"')
        ids = encoder.prompt_ids(text, rendered=False, hidden=False)[:max_length]
        if len(ids) < 2:
            raise ValueError(f"{row.place}: has less than two tokens; leave it out")
        mask = np.arange(len(ids)) > 0
        yield language, TokenRow("", row.place, np.array(ids, np.int32), mask, len(text.encode()), False)
