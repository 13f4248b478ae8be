"""A row's content: its text; its prompt and completion; or its messages, with tools where there are some."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_ENCODER = json.JSONEncoder(ensure_ascii=False, sort_keys=True, allow_nan=False)

Content = dict[str, Any]  # a row's text, prompt and completion, or messages and tools


@dataclass(frozen=True, slots=True)
class Reading:
    """A row as it was read: its content, and the fields of its turns that nobody reads."""

    content: Content
    unread: tuple[str, ...] = ()


def content_text(content: Content) -> str:
    """The characters of a row's content: what its split, its duplicates and its length are taken from.

    Raises:
        ValueError, TypeError: a tool or a call holds what JSON cannot.
    """
    if "text" in content:
        return str(content["text"])
    if "messages" in content:
        return _ENCODER.encode(content)
    return str(content["prompt"] + content["completion"])
