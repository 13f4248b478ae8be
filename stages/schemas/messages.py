"""A conversation, or a question with its answer → messages, together with the row's other columns for them.

These are `system`, `tools`, and `history` (LLaMA-Factory's earlier rounds).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from stages.schemas.content import Content, Reading
from stages.schemas.conversation import Message, messages_of
from stages.schemas.structured import parsed, tools_of
from stages.schemas.text import EmptyError, holds, is_blank, text_of

Fields = Mapping[str, Any]


def of_conversation(row: Fields, column: str) -> Reading:
    """The turns in a column.

    Raises:
        ValueError: one of them, or what stands beside them, cannot be read.
        EmptyError: there are none, or a question or an answer is blank.
    """
    messages, unread = messages_of(row.get(column), column)
    return _reading(row, messages, unread)


def of_pair(row: Fields, question: str, answer: str | None) -> Reading:
    """The rounds of `history`, then the question and its answer, if it has one already.

    Raises:
        ValueError: what stands beside them cannot be read.
        EmptyError: a question or an answer in the history is blank.
    """
    messages = [*_history(row), {"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return _reading(row, messages, ())


def of_prompt_and_completion(row: Fields) -> Reading:
    """`prompt` and `completion`, one at least given as turns, as one conversation: answers in the prompt are context.

    Raises:
        ValueError: one of them, or what stands beside them, cannot be read.
        EmptyError: one of them is empty, or a question or an answer is blank.
    """
    prompt, unread = _turns(row, "prompt", "user")
    completion, more = _turns(row, "completion", "assistant")
    context = [{**message, "train": False} if message["role"] == "assistant" else message for message in prompt]
    return _reading(row, [*_history(row), *context, *completion], unread | more)


def _turns(row: Fields, column: str, speaker: str) -> tuple[list[Message], set[str]]:
    value = row.get(column)
    if isinstance(value, list | Mapping):
        return messages_of([value] if isinstance(value, Mapping) else value, column)
    return [{"role": speaker, "content": text_of(row, column)}], set()


def _reading(row: Fields, messages: list[Message], unread: Iterable[str]) -> Reading:
    content: Content = {"messages": _with_system(row, messages)}
    tools = tools_of(row)
    return Reading(content if tools is None else content | {"tools": tools}, tuple(sorted(unread)))


def _with_system(row: Fields, messages: list[Message]) -> list[Message]:
    """The messages, the row's `system` first."""
    if not holds(row.get("system")):
        return messages
    system = {"role": "system", "content": text_of(row, "system")}
    if messages[0]["role"] != "system":
        return [system, *messages]
    if messages[0] != system:
        raise ValueError("its 'system' and the system turn say different things; keep one of them")
    return messages


def _history(row: Fields) -> list[Message]:
    rounds = parsed(row["history"], "history") if holds(row.get("history")) else []
    if not isinstance(rounds, list) or not all(_is_round(pair) for pair in rounds):
        raise ValueError("'history' must be a list of [question, answer] pairs; correct the row")
    if any(is_blank(text) for pair in rounds for text in pair):
        raise EmptyError("'history' has an empty turn", "history")
    return [
        {"role": role, "content": text}
        for pair in rounds
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _is_round(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
