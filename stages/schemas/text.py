"""Text in a row's columns, and the test for columns that hold none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# White space, control characters, and what Unicode lets a program show as nothing.
# Source: Unicode Character Database, DerivedCoreProperties, Default_Ignorable_Code_Point.
_VISIBLE = re.compile(
    "[^\\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)


class DroppedError(ValueError):
    """The row is dropped, and counted under `reason`: it is no mistake."""

    reason = "empty"


class EmptyError(DroppedError):
    """The row has no text where it should have some: in `column`, if that is a column."""

    def __init__(self, message: str, column: str | None = None) -> None:
        super().__init__(message)
        self.column = column


def is_blank(text: str) -> bool:
    """True if a text shows nothing: white space, control and zero-width characters alone."""
    return _VISIBLE.search(text) is None


def holds(value: Any) -> bool:
    """True if a column holds something: no null, no blank text, no empty list or object, nor the JSON text of one."""
    if isinstance(value, str):
        return not is_blank(value) and value.strip() not in ("[]", "{}")
    return value is not None and value != [] and value != {}


def text_of(row: Mapping[str, Any], name: str) -> str:
    """The text in a row's column.

    Raises:
        ValueError: there is no such column, or it holds something else.
        EmptyError: it is blank.
    """
    if name not in row:
        raise ValueError(f"has no {name!r} (it has: {listed(row)})")
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be text, not {'null' if value is None else type(value).__name__}")
    if is_blank(value):
        raise EmptyError(f"{name!r} is empty", name)
    return value


def listed(names: Iterable[Any], limit: int = 8) -> str:
    """Column names for a message of one line, whatever they are made of."""
    shown = [str(name) if str(name).isprintable() else ascii(name) for name in names]
    return ", ".join([*shown[:limit], *(["…"] if len(shown) > limit else [])]) or "nothing"
