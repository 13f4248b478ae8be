"""Rows that say which answers are wanted: preference pairs, and labels of true and false (KTO).

A pair is `chosen` and `rejected`, beside a conversation, a prompt or a question, or each a whole conversation; each is
text, a turn or a list of turns. Sources: TRL's dataset formats; LLaMA-Factory's; OpenAI's preference fine-tuning.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from stages.schemas.conversation import role_of
from stages.schemas.structured import parsed
from stages.schemas.text import DroppedError, holds, listed, text_of

Preferences = Literal["error", "chosen"]
Labels = Literal["error", "drop_false", "ignore"]

_CHOSEN = ("chosen", "chosen_messages", "preferred_output")
_REJECTED = ("rejected", "rejected_messages", "non_preferred_output")
LABELS = ("label", "kto_tag")
_TRUTH = {"true": True, "false": False}  # as CSV spells it
_NUMBERS = {"1": True, "0": False}
_CONVERSATIONS = ("messages", "conversations")
# A question's column → its answer's.
_ANSWERS = {"prompt": "completion", "question": "answer", "instruction": "output"}


class UnwantedError(DroppedError):
    """The row's label says that its answer is not wanted."""

    reason = "label_false"


def resolve_label(row: Mapping[str, Any], labels: Labels, decided: Collection[str]) -> None:
    """Pass a row whose answer is wanted. `decided` are the columns that the parameters name.

    Raises:
        ValueError: it has a label, and labels are an error.
        UnwantedError: its label is false, and such rows are dropped.
    """
    if labels == "ignore":
        return
    for name in LABELS:
        truth = truth_of(row.get(name), labels)
        if truth is None or name in decided:
            continue
        if labels == "error":
            raise ValueError(
                f"its {name!r} says whether the answer is wanted; set prepare.labels: drop_false to train on those "
                "that are, or ignore to train on all"
            )
        if not truth:
            raise UnwantedError(f"its {name!r} is false")


def truth_of(value: Any, labels: Labels) -> bool | None:
    """True if a label says that the answer is wanted, False if not; None if it is of another kind.

    1 and 0 are often numbers of classes: they count where the parameters say that labels are about answers.
    """
    known = _TRUTH | (_NUMBERS if labels == "drop_false" else {})
    return known.get(str(value).strip().lower()) if isinstance(value, str | int) else None


def resolve_pair(row: dict[str, Any], preferences: Preferences, decided: Collection[str]) -> dict[str, Any]:
    """The row itself or, of a preference pair, a row whose answer is the chosen one.

    Raises:
        ValueError: it is a pair and pairs are an error, or its chosen answer cannot be used.
    """
    held = [
        name for name in (*_CHOSEN, *_REJECTED) if isinstance(row.get(name), str | list | Mapping) and holds(row[name])
    ]
    if not held or any(name in decided for name in _CHOSEN):
        return row
    if preferences == "error":
        raise ValueError(
            f"is a preference pair ({listed(held)}); set prepare.preferences: chosen to train on the chosen answer"
        )
    name = next((name for name in held if name in _CHOSEN), None)
    if name is None:
        raise ValueError(f"has {listed(held)}, but no chosen answer; correct the row")
    rest = {key: value for key, value in row.items() if key not in _CHOSEN and key not in _REJECTED}
    if name == "preferred_output" and isinstance(rest.get("input"), Mapping):
        rest |= rest.pop("input")  # OpenAI's: the messages and tools before the answer
    chosen = row[name] if name == "chosen" else parsed(row[name], name)
    return _with_answer(rest, [chosen] if isinstance(chosen, Mapping) else chosen, name)


def _with_answer(rest: dict[str, Any], chosen: Any, name: str) -> dict[str, Any]:
    """A row of the other columns and the chosen answer: text, or a list of turns."""
    turns = isinstance(chosen, list)
    if turns and chosen and role_of(chosen[0]) != "assistant":  # the whole conversation
        before = (*_CONVERSATIONS, *_ANSWERS, *_ANSWERS.values())
        for column in before:
            _refuse_lost_system(rest.get(column), column, chosen, name)
        return {key: value for key, value in rest.items() if key not in before} | {"messages": chosen}
    for column in _CONVERSATIONS:
        if holds(rest.get(column)):
            prompt = parsed(rest.pop(column), column)
            _refuse_answered(prompt, column, name)
            return rest | {"prompt": prompt, "completion": chosen}
    for question, answer in _ANSWERS.items():
        if question in rest:
            _refuse_answered(rest[question], question, name)
            return rest | {answer: _only_text(chosen, name) if turns and question != "prompt" else chosen}
    return rest | {"messages" if turns else "text": chosen}


def _refuse_lost_system(prompt: Any, column: str, chosen: list[Any], name: str) -> None:
    """Raise ValueError if the turns that the chosen conversation replaces have a system turn that it lacks."""
    turns = prompt if isinstance(prompt, list) else []
    if any(role_of(turn) == "system" and turn not in chosen for turn in turns):
        raise ValueError(f"its {column!r} has a system turn that {name!r} lacks; put it there, or take it out of both")


def _refuse_answered(prompt: Any, column: str, name: str) -> None:
    """Raise ValueError if the turns before the chosen answer end with an answer."""
    if isinstance(prompt, list) and prompt and role_of(prompt[-1]) == "assistant":
        raise ValueError(
            f"its {column!r} ends with an answer, before the one in {name!r}; remove that turn, or give the whole "
            f"conversation in {name!r}"
        )


def _only_text(turns: list[Any], name: str) -> str:
    turn = turns[0] if len(turns) == 1 and isinstance(turns[0], Mapping) else {}
    column = next((column for column in ("content", "value") if column in turn), None)
    if column is None:
        raise ValueError(f"{name!r} must be one answer of text beside a question; correct the row")
    return text_of(turn, column)
