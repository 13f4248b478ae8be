"""The template: a row's columns → the text to learn, parted into prompt and completion.

A template is ordinary text with columns in braces, `Q: {question}\\nA: {answer}`. What precedes its last column is the
prompt, the rest the completion, the part that the model is to produce.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any


class Template:
    """A parsed template.

    Raises:
        ValueError: unbalanced braces, no column, or a column with a format specification.
    """

    def __init__(self, text: str) -> None:
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"prepare.template: {error}; double a brace that stands for itself") from None
        self.columns = [name for _, name, _, _ in parts if name is not None]
        if not self.columns or not all(name.isidentifier() for name in self.columns):
            raise ValueError("prepare.template: needs column names in braces, such as {question} and {answer}")
        last = max(index for index, part in enumerate(parts) if part[1] is not None)
        self._prompt = [(literal, name) for literal, name, _, _ in parts[:last]] + [(parts[last][0], None)]
        self._completion = [("", parts[last][1])] + [(literal, name) for literal, name, _, _ in parts[last + 1 :]]

    def prompt(self, row: Mapping[str, Any]) -> str:
        """All that precedes the completion; needs just the columns that occur there."""
        return _render(self._prompt, row)

    def completion(self, row: Mapping[str, Any]) -> str:
        """What the model is to learn to produce."""
        return _render(self._completion, row)


def _render(parts: list[tuple[str, str | None]], row: Mapping[str, Any]) -> str:
    return "".join(literal + (_column(row, name) if name else "") for literal, name in parts)


def _column(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise ValueError(f"has no {name!r} (it has: {', '.join(map(str, row)) or 'nothing'})")
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be text, not {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{name!r} is empty")
    return value
