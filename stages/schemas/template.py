"""The template: a row's columns → the text to learn, parted into prompt and completion.

A template is ordinary text with columns in braces, `Q: {question}\\nA: {answer}`. What precedes its last column is the
prompt, the rest the completion, the part that the model is to produce.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from stages.schemas.text import holds, text_of


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
        self.text = text
        self.columns = [name for _, name, _, _ in parts if name is not None]
        if any(spec or conversion for _, _, spec, conversion in parts):
            raise ValueError("prepare.template: a column stands alone in its braces, without : or !")
        if not self.columns or not all(name.isidentifier() for name in self.columns):
            raise ValueError("prepare.template: needs column names in braces, such as {question} and {answer}")
        # Alpaca's input is empty where the instruction says it all.
        self.optional = {"input"} if {"instruction", "input"} <= set(self.columns) else set()
        last = max(index for index, part in enumerate(parts) if part[1] is not None)
        self._prompt = [(literal, name) for literal, name, _, _ in parts[:last]] + [(parts[last][0], None)]
        self._completion = [("", parts[last][1])] + [(literal, name) for literal, name, _, _ in parts[last + 1 :]]

    def prompt(self, row: Mapping[str, Any]) -> str:
        """All that precedes the completion; needs just the columns that occur there."""
        return self._render(self._prompt, row)

    def completion(self, row: Mapping[str, Any]) -> str:
        """The last column and all that follows: the model learns to produce it."""
        return self._render(self._completion, row)

    def _render(self, parts: list[tuple[str, str | None]], row: Mapping[str, Any]) -> str:
        return "".join(literal + (self._column(row, name) if name else "") for literal, name in parts)

    def _column(self, row: Mapping[str, Any], name: str) -> str:
        if name in self.optional and not holds(row.get(name)):
            return ""
        return text_of(row, name)
