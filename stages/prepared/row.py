"""A row of data/prepared: what `prepare` writes and `tokenize` reads, one JSON object a line.

A row is one of three: `text`; `prompt` and `completion`, which together are the text; or `messages`, with `tools` where
there are some, which become text by the tokenizer's chat template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ENCODER = json.JSONEncoder(ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """`id` follows from the content alone, `source` is its place as `file:line`."""

    id: str
    source: str
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    group: str | None = None  # its value of prepare.group_by's column
    carried: dict[str, str] | None = None  # its values of prepare.carry's columns

    def line(self) -> str:
        """The row as a line of JSON."""
        fields = {name: getattr(self, name) for name in self.__slots__ if getattr(self, name) is not None}
        return _ENCODER.encode(fields) + "\n"


def text_id(text: str, salt: bytes = b"") -> str:
    """A stable name for a text: 16 hex digits of its BLAKE2b."""
    return hashlib.blake2b(text.encode(), digest_size=8, salt=salt).hexdigest()


def row_id(text: str, prompt: str | None) -> str:
    """A stable name for a row of this text, of which `prompt` is the beginning, if it has one.

    It is the text's, where the completion is the text's last line, as usual. Elsewhere the prompt's length counts as
    well: two rows whose prompt and completion only join to the same text have two names.
    """
    if prompt is None or len(prompt) == text.rfind("\n") + 1:
        return text_id(text)
    return text_id(text, len(prompt).to_bytes(8, "big"))


def read_prepared(path: Path, *, labels: bool = True) -> Iterator[PreparedRow]:
    """The rows of a file that `prepare` wrote; without `labels`, without group and carried columns.

    Raises:
        ValueError: the file is missing or was not written by `prepare`.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                fields = json.loads(line)
                if not labels:
                    fields.pop("group", None)
                    fields.pop("carried", None)
                yield PreparedRow(**fields)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; make it with: python -m stages.prepare") from None
    except (json.JSONDecodeError, TypeError, AttributeError, UnicodeDecodeError):
        raise ValueError(f"{path}: not written by prepare; make it anew with: python -m stages.prepare") from None
