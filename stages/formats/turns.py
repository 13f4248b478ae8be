"""What a tokenizer's chat template writes around the turns of a conversation, found by rendering probes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from stages.templating.render import render
from stages.templating.strings import Message

_DATE = "2026-01-01"
QUESTION, ANSWER, SYSTEM = "ProbeQ1", "ProbeA1", "ProbeS1"


def rendered(tokenizer: Any, turns: Sequence[tuple[str, str]], *, ask: bool) -> str | None:
    """The turns (role, content) as text by the tokenizer's chat template; None if it has none, or rejects them."""
    if not tokenizer.chat_template:
        return None
    messages: list[Message] = [{"role": role, "content": content} for role, content in turns]
    template, names = str(tokenizer.get_chat_template()), dict(tokenizer.special_tokens_map)
    with suppress(ValueError):
        return render(template, messages, None, ask=ask, date=_DATE, names=names).text
    return None


def end_of_turn(tokenizer: Any) -> str | None:
    """The control token that the chat template writes behind an answer; None if there is none."""
    text = rendered(tokenizer, [("user", QUESTION), ("assistant", ANSWER)], ask=False)
    if text is None or ANSWER not in text:
        return None
    behind = text.rpartition(ANSWER)[2].lstrip()
    tokens = sorted(tokenizer.all_special_tokens + list(tokenizer.get_added_vocab()), key=len, reverse=True)
    return next((token for token in tokens if token and behind.startswith(token)), None)
