"""Conversations of any spelling → messages in one form.

A message has `role` and `content`. An assistant's may have `reasoning_content`, `tool_calls` (each with an object of
arguments) and `"train": false` where the row says that it must not be learned; a tool's may have `name` and
`tool_call_id`. Sources: OpenAI's chat and fine-tuning formats; ShareGPT as LLaMA-Factory writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stages.schemas.structured import calls_of, parsed, unread_of_calls
from stages.schemas.text import EmptyError, holds, is_blank, listed

Message = dict[str, Any]

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool",
    # Their content is the JSON text of calls.
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
_CALLING = ("function_call", "tool_call")
_FLAGS = ("weight", "train", "training", "trainable", "loss")  # 1 or true: learned
_MASKS = ("masked",)  # 1 or true: not learned
_THOUGHTS = ("reasoning_content", "thinking")
_READ_ALWAYS = {"role", "from", "content", "value", *_FLAGS, *_MASKS}
_READ = {
    "system": _READ_ALWAYS,
    "user": _READ_ALWAYS,
    "assistant": _READ_ALWAYS | {"tool_calls", "function_call", "refusal", *_THOUGHTS},
    "tool": _READ_ALWAYS | {"name", "tool_call_id"},
}
_TEXT_PARTS = ("text", "input_text", "output_text")


def messages_of(value: Any, name: str) -> tuple[list[Message], set[str]]:
    """The turns in a row's column as messages, and the fields of them that nobody reads. A blank system turn goes.

    Raises:
        ValueError: not a list of turns, or a turn that cannot be read as what it says.
        EmptyError: no turns, or a question or an answer without content.
    """
    turns = parsed(value, name)
    if not isinstance(turns, list):
        raise ValueError(f"{name!r} must be a list of turns, not {'null' if turns is None else type(turns).__name__}")
    messages, unread = [], set()
    for number, turn in enumerate(turns, start=1):
        message, more = _message(turn, number)
        unread |= more
        if message is not None:
            messages.append(message)
    if not messages:
        raise EmptyError(f"{name!r} is empty", name)
    return messages, {f"{name}.{field}" for field in unread}


def role_of(turn: Any) -> str | None:
    """The role of a raw turn, as messages call it; None if it has none that is known."""
    given = turn.get("role") or turn.get("from") if isinstance(turn, Mapping) else None
    return _ROLES.get(given) if isinstance(given, str) else None


def _message(turn: Any, number: int) -> tuple[Message | None, set[str]]:
    """A turn as a message, None if it says nothing that matters; and its fields that nobody reads."""
    if not isinstance(turn, Mapping):
        raise ValueError(f'turn {number} must be an object such as {{"role": "user", "content": "…"}}')
    fields = {key: value for key, value in turn.items() if value is not None}
    given = fields.get("role") or fields.get("from")
    if not isinstance(given, str):
        raise ValueError(f"turn {number} has no 'role'; name who speaks, such as user or assistant")
    role = _ROLES.get(given)
    if role is None:
        raise ValueError(f"turn {number} has the unknown role {given!a}; known: {', '.join(_ROLES)}")
    where = f"turn {number} ({given})"
    unread = {key for key, value in fields.items() if key not in _READ[role] and holds(value)}
    if "tool_calls" in unread:
        raise ValueError(f"{where} has 'tool_calls'; only an assistant's turn calls tools")
    if role == "assistant":
        answer = _answer(fields, given, where)
        calls = (
            fields.get("content", fields.get("value"))
            if given in _CALLING
            else fields.get("tool_calls") or fields.get("function_call")
        )
        return answer, unread | (unread_of_calls(calls) if calls else set())
    content = _content(fields, where) if role == "user" or "content" in fields or "value" in fields else ""
    if is_blank(content) and role == "system":
        return None, unread
    if is_blank(content) and role == "user":
        raise EmptyError(f"{where} is empty")
    message: Message = {"role": role, "content": content}
    if role == "tool":
        message |= {key: str(fields[key]) for key in ("name", "tool_call_id") if key in fields}
    return message, unread


def _answer(fields: Mapping[str, Any], given: str, where: str) -> Message:
    """An assistant's turn as a message."""
    calls: list[dict[str, Any]] = []
    if given in _CALLING:
        content = ""
        calls = calls_of(fields.get("content", fields.get("value")), where)
    elif fields.get("tool_calls"):
        calls = calls_of(fields["tool_calls"], f"{where}: 'tool_calls'")
    if fields.get("function_call"):
        if calls:
            raise ValueError(f"{where} has calls in two places; keep 'tool_calls', remove 'function_call'")
        calls = calls_of(fields["function_call"], f"{where}: 'function_call'")
    if given not in _CALLING:
        content = _said(fields, where, optional=bool(calls))
    thoughts = _thoughts(fields, where)
    if is_blank(content) and not calls and not thoughts:
        raise EmptyError(f"{where} is empty")
    message: Message = {"role": "assistant", "content": content}
    if thoughts:
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = calls
    if not _is_trained(fields, where):
        message["train"] = False
    return message


def _said(fields: Mapping[str, Any], where: str, *, optional: bool) -> str:
    """An answer's text; OpenAI's `refusal` is one too."""
    refusal = fields.get("refusal", "")
    if not isinstance(refusal, str):
        raise ValueError(f"{where}: 'refusal' must be text, not {type(refusal).__name__}")
    optional = optional or not is_blank(refusal)
    content = _content(fields, where) if not optional or "content" in fields or "value" in fields else ""
    if is_blank(refusal):
        return content
    if not is_blank(content):
        raise ValueError(f"{where} has a 'content' and a 'refusal'; keep the one that is to be learned")
    return refusal


def _content(fields: Mapping[str, Any], where: str) -> str:
    """A turn's text: as it is, or its parts joined."""
    content = fields.get("content", fields.get("value"))
    if isinstance(content, str):
        return content
    if content is None:
        raise ValueError(f"{where} has no 'content' (it has: {listed(fields)}); give it one")
    if not isinstance(content, list):
        raise ValueError(f"{where}: 'content' must be text, not {type(content).__name__}")
    return "".join(_part(part, f"{where}: part {number} of 'content'") for number, part in enumerate(content, start=1))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f'{where} must be text, as {{"type": "text", "text": "…"}}, not {type(part).__name__}')
    kind = part.get("type", "text")
    name = "refusal" if kind == "refusal" else "text"
    if kind != name and kind not in _TEXT_PARTS:
        raise ValueError(f"{where} is of type {kind!a}; only text is trained here: remove the part, or the row")
    if not isinstance(part.get(name), str):
        raise ValueError(f"{where} has no {name!r}; give it one, or remove it")
    return str(part[name])


def _thoughts(fields: Mapping[str, Any], where: str) -> str:
    """The assistant's thoughts before it answers; "" if there are none."""
    given = {name: fields[name] for name in _THOUGHTS if name in fields}
    for name, thought in given.items():
        if not isinstance(thought, str):
            raise ValueError(f"{where}: {name!r} must be text, not {type(thought).__name__}")
    thoughts = list(dict.fromkeys(thought for thought in given.values() if not is_blank(thought)))
    if len(thoughts) > 1:
        raise ValueError(f"{where}: {' and '.join(map(repr, given))} say different things; keep one of them")
    return thoughts[0] if thoughts else ""


def _is_trained(fields: Mapping[str, Any], where: str) -> bool:
    """False if one of the turn's flags says that it must not be learned."""
    for name in (*_FLAGS, *_MASKS):
        if name in fields and fields[name] not in (0, 1):  # as true and false are
            raise ValueError(f"{where}: {name!r} is {fields[name]!a}; a turn is learned or not: make it 1 or 0")
    return all(fields.get(name, 1) for name in _FLAGS) and not any(fields.get(name, 0) for name in _MASKS)
