"""Conversations of any spelling → messages as chat templates want them: `role`, `content` and what else a turn has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stages.schemas.template import EmptyError

# ShareGPT's names, and other people's.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_KNOWN = ("system", "developer", "user", "assistant", "tool", "function")


def messages_of(value: Any, name: str) -> list[dict[str, Any]]:
    """The turns in a row's column, `from`/`value` renamed to `role`/`content`.

    Raises:
        ValueError: not a list of turns, or a turn without a known role or without text.
        EmptyError: no turns, or one without content.
    """
    turns = parsed(value, name)
    if not isinstance(turns, list):
        raise ValueError(f"{name!r} must be a list of turns, not {'null' if turns is None else type(turns).__name__}")
    if not turns:
        raise EmptyError(f"{name!r} is empty")
    return [_message(turn, number) for number, turn in enumerate(turns, start=1)]


def parsed(value: Any, name: str) -> Any:
    """The value itself, or what its JSON says: a CSV cell holds a conversation as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(f"{name!r} is text, but not JSON; it must be a list") from None


def _message(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise ValueError(f'turn {number} must be an object such as {{"role": "user", "content": "…"}}')
    # Columnar files fill in a null wherever another turn has a field.
    fields = {key: value for key, value in turn.items() if value is not None}
    given = fields.pop("role", None) or fields.pop("from", None)
    if not isinstance(given, str):
        raise ValueError(f"turn {number} has no 'role'; name who speaks, such as user or assistant")
    role = _ROLES.get(given, given)
    if role not in _KNOWN:
        raise ValueError(f"turn {number} has the unknown role {given!a}; known: {', '.join(_KNOWN)}")
    content = fields.pop("content", None)
    content = fields.pop("value", None) if content is None else content
    fields.pop("from", None)
    if content is None and fields.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        what = "has no 'content'" if content is None else f"'content' must be text, not {type(content).__name__}"
        raise ValueError(f"turn {number} ({role}): {what}")
    if not content.strip() and not fields.get("tool_calls"):
        raise EmptyError(f"turn {number} is empty")
    return {"role": role, "content": content, **fields}
