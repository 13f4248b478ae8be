"""A row's content: its text; its prompt and completion; or its messages, with tools where there are some."""

from __future__ import annotations

import json
from typing import Any

Content = dict[str, Any]  # a row's text, prompt and completion, or messages and tools


def content_text(content: Content) -> str:
    """The characters of a row's content: what its id, its duplicates and its length are taken from."""
    if "text" in content:
        return str(content["text"])
    if "messages" in content:
        return json.dumps(content, ensure_ascii=False, sort_keys=True)
    return str(content["prompt"] + content["completion"])
