"""What a tokenizer's chat template writes around the turns of a conversation, found by rendering probes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from stages.templating.render import render
from stages.templating.strings import Message

_DAY = "2026-01-01"
_Q, _A, _R, _S = "ProbeQ1", "ProbeA1", "ProbeQ2", "ProbeS1"
Turns = Sequence[tuple[str, str]]  # role and content


@dataclass(frozen=True)
class SystemForm:
    """What stands around a system prompt: before all turns, or inside of the first user's turn, where `open` is ""."""

    open: str
    close: str
    inside_user: bool


@dataclass(frozen=True)
class TurnForm:
    """The words around turns, the same for each turn of a role.

    `start` stands before a conversation without a system prompt, `ask` between a user's words and the answer. Of a
    `system` None the template knows none.
    """

    start: str
    user_open: str
    ask: str
    answer_close: str
    system: SystemForm | None

    def write(self, turns: Turns) -> str:
        """The conversation as text, the prompt of the next answer behind it if a user speaks last."""
        said = list(turns)
        system = said.pop(0)[1] if said[0][0] == "system" else None
        text, inside = self.start, ""
        if system is not None and self.system is not None:
            around = self.system.open + system + self.system.close
            text, inside = (self.start, around) if self.system.inside_user else (around, "")
        for role, content in said:
            if role == "user":
                text, inside = text + self.user_open + inside + content + self.ask, ""
            else:
                text += content + self.answer_close
        return text


def find_form(tokenizer: Any, *, adds_bos: bool, date: str = _DAY) -> TurnForm | None:
    """The form of turns of a chat template; None if it writes turns otherwise.

    `adds_bos`: whoever tokenises the text puts BOS before it, so that the form has none. `date`: the template's today.
    """
    probes = _Probes(tokenizer, tokenizer.bos_token if adds_bos else None, date)
    turns: Turns = [("user", _Q), ("assistant", _A), ("user", _R)]
    first, later = probes.text(turns[:1]), probes.text(turns)
    if first is None or later is None:
        return None
    opened, _, ask = first.partition(_Q)
    between = later.partition(_A)[2].partition(_R)[0]
    close = _closing(between, end_of_turn(tokenizer))
    user_open = between[len(close) :]
    if not opened.endswith(user_open):
        return None
    start = opened[: len(opened) - len(user_open)]
    form = TurnForm(start, user_open, ask, close, _system(probes, start, user_open))
    wanted: list[Turns] = [turns, turns[:1], [("user", _R), ("assistant", _Q), *turns[:1]]]
    if form.system is not None:
        wanted += [[("system", _S), *each] for each in wanted]
    return form if all(probes.text(each) == form.write(each) for each in wanted) else None


def _closing(between: str, token: str | None) -> str:
    """What ends an answer, of the words between it and the next question: its last token, and white space."""
    if token is None or token not in between:
        return ""
    end = between.index(token) + len(token)
    return between[: end + len(between[end:]) - len(between[end:].lstrip())]


def _system(probes: _Probes, start: str, user_open: str) -> SystemForm | None:
    text = probes.text([("system", _S), ("user", _Q)])
    if text is None or _S not in text or _Q not in text:
        return None
    before, _, rest = text.partition(_S)
    close = rest.partition(_Q)[0]
    if user_open and close.endswith(user_open):
        return SystemForm(before, close[: len(close) - len(user_open)], inside_user=False)
    return SystemForm("", close, inside_user=True) if before == start + user_open else None


class _Probes:
    """Renders turns, without BOS at the start if `bos` says what it is."""

    def __init__(self, tokenizer: Any, bos: str | None, date: str) -> None:
        self._tokenizer, self._bos, self._date = tokenizer, bos, date

    def text(self, turns: Turns) -> str | None:
        """The text, the prompt of an answer behind it; None if the template rejects the turns."""
        text = rendered(self._tokenizer, turns, ask=True, date=self._date)
        return None if text is None else text.removeprefix(self._bos or "")


def rendered(tokenizer: Any, turns: Turns, *, ask: bool, date: str = _DAY) -> str | None:
    """The turns as text by the tokenizer's chat template; None if it has none, or rejects them."""
    if not tokenizer.chat_template:
        return None
    messages: list[Message] = [{"role": role, "content": content} for role, content in turns]
    template, names = str(tokenizer.get_chat_template()), dict(tokenizer.special_tokens_map)
    with suppress(ValueError):
        return render(template, messages, None, ask=ask, date=date, names=names).text
    return None


def end_of_turn(tokenizer: Any) -> str | None:
    """The control token that the chat template writes behind an answer; None if there is none."""
    text = rendered(tokenizer, [("user", _Q), ("assistant", _A)], ask=False)
    if text is None or _A not in text:
        return None
    behind = text.rpartition(_A)[2].lstrip()
    tokens = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True)
    return next((token for token in tokens if token and behind.startswith(token)), None)
