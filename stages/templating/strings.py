"""The strings of a conversation's turns, and marks in their place that show where a chat template puts them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Message = dict[str, Any]

# Private-use characters: no template looks for them in a content, and JSON keeps them.
MARK = re.compile("\uf8f0(\\d+)\uf8f1(.*?)\uf8f2\\1\uf8f3", re.DOTALL)
# A thought may stand in the content, as the model writes it: "<think>…</think>…", or without the first tag.
_THOUGHT = re.compile(r"\s*(?:<think>)?((?:(?!<think>).)*?)</think>(.*)", re.DOTALL)
# Words of a system prompt that templates take out as switches.
_SWITCH = re.compile(r"(/no_think|/think)")


@dataclass(frozen=True, slots=True)
class String:
    """A string of a turn, turns counted from 0."""

    turn: int
    kind: Literal["content", "thought", "argument"]
    text: str


def opening(number: int) -> str:
    """The start of the mark in place of the string of that number."""
    return f"\uf8f0{number}\uf8f1"


def closing(number: int) -> str:
    """The end of the mark in place of the string of that number."""
    return f"\uf8f2{number}\uf8f3"


class _Marker:
    """Collects strings and puts marks in their place; `around`: about them, so that a template still sees them."""

    def __init__(self, *, around: bool) -> None:
        self.strings: list[String] = []
        self._around = around

    def mark(self, turn: int, kind: Literal["content", "thought", "argument"], text: str) -> str:
        """The mark for a string. A blank string stays as it is, for templates test for it."""
        core = text.strip()
        if not core:
            return text
        number = len(self.strings)
        if not self._around:
            self.strings.append(String(turn, kind, text))
            return opening(number) + closing(number)
        self.strings.append(String(turn, kind, core))
        before, _, after = text.partition(core)
        return f"{before}{opening(number)}{core}{closing(number)}{after}"

    def message(self, turn: int, message: Message) -> Message:
        marked = dict(message)
        if thought := message.get("reasoning_content"):
            marked["reasoning_content"] = self.mark(turn, "thought", thought)
        marked["content"] = self._content(turn, message)
        if calls := message.get("tool_calls"):
            marked["tool_calls"] = [self._call(turn, call) for call in calls]
        return marked

    def _content(self, turn: int, message: Message) -> str:
        content: str = message["content"]
        if message["role"] == "system":
            pieces = _SWITCH.split(content)
            return "".join(p if i % 2 else self.mark(turn, "content", p) for i, p in enumerate(pieces))
        parts = _THOUGHT.match(content) if message["role"] == "assistant" else None
        if not parts or not (parts[1].strip() or parts[2].strip()):
            return self.mark(turn, "content", content)
        tags = [content[: parts.start(1)] if self._around else content[: parts.start(1)].strip(), "</think>"]
        return tags[0] + self.mark(turn, "thought", parts[1]) + tags[1] + self.mark(turn, "content", parts[2])

    def _call(self, turn: int, call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function")
        if not isinstance(function, dict) or "arguments" not in function:
            return call
        return {**call, "function": {**function, "arguments": self._argument(turn, function["arguments"])}}

    def _argument(self, turn: int, value: Any) -> Any:
        if isinstance(value, str):
            return self.mark(turn, "argument", value)
        if isinstance(value, list):
            return [self._argument(turn, item) for item in value]
        if isinstance(value, dict):
            return {key: self._argument(turn, item) for key, item in value.items()}
        return value


def marked(messages: Sequence[Message], *, around: bool) -> tuple[list[Message], list[String]]:
    """The messages with marks in place of their strings, or `around` them; the strings by the marks' numbers."""
    marker = _Marker(around=around)
    return [marker.message(turn, message) for turn, message in enumerate(messages)], marker.strings


def without_thought(message: Message) -> Message:
    """The message without what its turn thinks, in `reasoning_content` or at the start of its content."""
    kept = {key: value for key, value in message.items() if key != "reasoning_content"}
    parts = _THOUGHT.match(message["content"]) if message["role"] == "assistant" else None
    return {**kept, "content": parts[2].lstrip()} if parts else kept


def spellings(text: str) -> Iterator[str]:
    """The forms in which a template may write a string: as it is, trimmed, or as JSON has it between the quotes."""
    trimmed = [text]
    if text[:1].isspace() or text[-1:].isspace():
        lines = text.strip("\n"), text.rstrip("\n"), text.lstrip("\n")
        trimmed += [*lines, text.strip(), text.rstrip(), text.lstrip()]
    yield from trimmed
    for form in trimmed:
        for escaped in (json.dumps(form, ensure_ascii=False)[1:-1], json.dumps(form)[1:-1]):
            if escaped != form:
                yield escaped
                yield json.dumps(escaped, ensure_ascii=False)[1:-1]  # JSON text within JSON text


def names_of_calls(message: Message) -> Iterator[str]:
    """The names, keys and numbers of a turn's tool calls."""
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        yield str(function.get("name") or "")
        yield from _keys_and_numbers(function.get("arguments"))


def _keys_and_numbers(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _keys_and_numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from _keys_and_numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):  # true and null have several spellings
        yield json.dumps(value)


def strings_of_tools(value: Any, *, schema: bool = True) -> Iterator[str]:
    """The strings that tools say: all but the words of JSON Schema itself (its keys, its types, what is required)."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings_of_tools(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not schema:
                yield key
                yield from strings_of_tools(item)
            elif key not in ("type", "required") or isinstance(item, dict):
                yield from strings_of_tools(item, schema=key != "properties")
