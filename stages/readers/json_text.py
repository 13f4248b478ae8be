"""JSON text → a value, in which no object has a key twice.

Source: RFC 8259, section 4: what a repeated key means differs from parser to parser.
"""

from __future__ import annotations

import json
from typing import Any


class DuplicateKeyError(ValueError):
    """A key stands twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DuplicateKeyError(f"the key {twice!a} stands twice in one object; keep one of the two")
    return fields


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def decode(text: str) -> Any:
    """The value that a text of JSON stands for.

    Raises:
        ValueError: it is no JSON, or an object in it has a key twice (`DuplicateKeyError`).
        RecursionError: it is nested too deep.
    """
    return DECODER.decode(text)
