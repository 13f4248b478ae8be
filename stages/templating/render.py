"""Messages → text by a chat template, as transformers renders it, except that today is a given date."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from stages.templating.strings import Message

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Render:
    """A conversation as text, and the characters that the template marks with {% generation %}; None: it marks none."""

    text: str
    generated: tuple[tuple[int, int], ...] | None


def render(
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    *,
    ask: bool,
    date: str,
    names: Mapping[str, Any],
    calls_as_text: bool = False,
) -> Render:
    """The conversation as text; with `ask`, followed by the generation prompt. `names`: the special tokens'.

    Some templates (DeepSeek's) want the arguments of a tool call as JSON text, and no content beside it:
    `calls_as_text`.

    Raises:
        ValueError: the template rejects it.
    """
    # The compiled template is transformers' own, with its sandbox and filters; its public function takes no date.
    from transformers.utils.chat_template_utils import _compile_jinja_template, _render_with_assistant_indices

    variables = {
        "messages": [_as_templates_read(message, calls_as_text=calls_as_text) for message in messages],
        "tools": list(tools) if tools else None,
        "documents": None,
        "add_generation_prompt": ask,
        "strftime_now": datetime.fromisoformat(date).strftime,
        **names,
    }
    try:
        compiled = _compile_jinja_template(template)
        if not _GENERATION.search(template):
            return Render(compiled.render(**variables), None)
        text, generated = _render_with_assistant_indices(compiled, **variables)
    # A template is a program: it fails in its own words (raise_exception) or in Python's.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the chat template rejects the turns {roles(messages)}: {reason}") from None
    return Render(text, tuple(generated))


def roles(messages: Sequence[Message]) -> str:
    """The roles of the first turns, for messages to the user."""
    return ", ".join(str(message["role"]) for message in messages[:12])


def _as_templates_read(message: Message, *, calls_as_text: bool) -> Message:
    """Without the project's own flag; a thought under both of the names that templates know."""
    read = {key: value for key, value in message.items() if key != "train"}
    if calls_as_text and (calls := read.get("tool_calls")):
        read["tool_calls"] = [_with_text(call) for call in calls]
        read["content"] = read["content"] if read["content"].strip() else None
    return {"thinking": read["reasoning_content"], **read} if read.get("reasoning_content") else read


def _with_text(call: Message) -> Message:
    """A tool call with its arguments as JSON text."""
    function = call.get("function") or {}
    text = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
