"""The borders of answers: the places in a chat template's words where each answer begins and ends.

An answer begins where the words before its first string stop agreeing with what the turns before it and the generation
prompt make, counted from the string before. It ends with the end-of-turn token after its last string: what stands there
when the turn is the last one shows which of the words are still its own. Both comparisons look only at words between
two strings, so a block that a template moves with the number of turns moves no border.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stages.templating.render import roles
from stages.templating.strings import Message, closing, marked, opening, without_thought

HINT = "give another in tokenize.chat_template, or correct the row"
_KNOWN = 4096  # borders kept at a time


@dataclass(frozen=True, slots=True)
class Border:
    """A place in the template's words: so many characters into the words of that number."""

    words: int
    offset: int


@dataclass(frozen=True, slots=True)
class AnswerBorders:
    """The start and the end of a turn's answer; from `closes` on there is only the token that ends it."""

    turn: int
    start: Border
    end: Border
    closes: Border


class Writer:
    """Writes turns by a template.

    `render` makes text of turns, tools and whether to ask for an answer; `control` is a pattern of control tokens.
    """

    def __init__(
        self, render: Callable[[Sequence[Message], Sequence[Any] | None, bool], str], control: re.Pattern[str]
    ) -> None:
        self._render, self._control = render, control
        self._headers: dict[bool, str] = {}
        self._known: dict[Any, tuple[int, int, int]] = {}

    def header(self, tools: Sequence[Any] | None) -> str:
        """The words that the template writes at the start of any answer; "" if that cannot be told."""
        # A tokenizer may have another template for rows with tools.
        if bool(tools) not in self._headers:
            self._headers[bool(tools)] = self._find_header(tools)
        return self._headers[bool(tools)]

    def once(self, key: Any, find: Callable[[], tuple[int, int, int]]) -> tuple[int, int, int]:
        """The result of `find`, which is called once for a key."""
        if key not in self._known:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            self._known[key] = find()
        return self._known[key]

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> str:
        """The text.

        Raises:
            ValueError: the template rejects these turns.
        """
        return self._render(messages, tools, False)

    def try_render(self, messages: Sequence[Message], tools: Sequence[Any] | None, *, ask: bool = False) -> str | None:
        """The text, or None where the template rejects these turns, such as none, or no user's turn."""
        try:
            return self._render(messages, tools, ask)
        except ValueError:
            return None

    def agreement(self, one: str, other: str) -> int:
        """The length of two texts' common prefix; a control token counts whole or not at all."""
        length = len(os.path.commonprefix([one, other]))  # noqa: RUF071  characters are what is meant
        for match in self._control.finditer(one):
            if match.start() < length < match.end():
                return match.start()
        return length

    def control(self, words: str, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
        """The places of control tokens."""
        return [match.span() for match in self._control.finditer(words, start, len(words) if end is None else end)]

    def _find_header(self, tools: Sequence[Any] | None) -> str:
        talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
        turns, _ = marked(talk, around=False)
        told = self.try_render(turns, tools)
        asked, plain = self.try_render(turns[:1], tools, ask=True), self.try_render(turns[:1], tools)
        if told is None or asked is None or plain is None:
            return ""
        between = told.partition(closing(0))[2].partition(opening(1))[0]
        after = asked.partition(closing(0))[2]
        common = between[: self.agreement(between, after)]
        return common[self.agreement(common, plain.partition(closing(0))[2]) :]


@dataclass(frozen=True, slots=True)
class View:
    """A conversation rendered with marks: the words, and each string's number and turn in the order of the text."""

    writer: Writer
    turns: Sequence[Message]
    tools: Sequence[Any] | None
    words: tuple[str, ...]
    order: tuple[int, ...]
    owners: Sequence[int]
    thoughtless: frozenset[int]  # turns with a thought that is left out

    def ending_with(self, turn: int) -> str | None:
        """The text of the turns up to this one."""
        return self.writer.try_render(self.turns[: turn + 1], self.tools)

    def answer(self, turn: int) -> AnswerBorders:
        """The borders of an assistant's turn.

        Raises:
            ValueError: the template gives it no words at all.
        """
        own = [place for place, owner in enumerate(self.owners) if owner == turn]
        earlier = [k for k, owner in enumerate(self.owners) if owner < turn and not is_system(self.turns[owner])]
        before = own[0] if own else max(earlier, default=-1) + 1
        after = own[-1] + 1 if own else before
        if not own:
            start = self._start(turn, before)
            end, closes = self._end(turn, after, start)
            if end <= start:
                raise ValueError(
                    f"the chat template says nothing in turn {turn + 1} (assistant) of {roles(self.turns)}; {HINT}"
                )
        else:
            start, end, closes = self._known(turn, before, after)
        return AnswerBorders(turn, Border(before, start), Border(after, end), Border(after, closes))

    def _known(self, turn: int, before: int, after: int) -> tuple[int, int, int]:
        """The places in the words before and after a turn's strings, which a template parts alike each time."""
        first = self.owners[before - 1] if before else -1
        last = self.owners[after] if after < len(self.owners) else len(self.turns)
        nearby = tuple(message["role"] for message in self.turns[max(first, 0) : last + 1])
        key = (self.words[before], self.words[after], nearby, before == 0, turn - first, turn == len(self.turns) - 1)
        return self.writer.once(key, lambda: (self._start(turn, before), *self._end(turn, after, 0)))

    def _start(self, turn: int, before: int) -> int:
        """The end of the turn's header, as an offset into the words before the turn's first string."""
        words, writer = self.words[before], self.writer
        asked = writer.try_render(self._before(turn), self.tools, ask=True) if before else None
        following = self._following(asked, before)
        start = None if following is None else writer.agreement(words, following)
        header = writer.header(self.tools)
        if header and header not in words[: start or 0] and header in words:
            return words.rindex(header) + len(header)
        if start is None and turn not in self.owners:
            raise ValueError(f"where turn {turn + 1} (assistant) of {roles(self.turns)} begins cannot be told; {HINT}")
        return len(words) if start is None else start

    def _end(self, turn: int, after: int, low: int) -> tuple[int, int]:
        """The end of the turn and the start of its end-of-turn token: offsets into the words after its last string."""
        words, writer = self.words[after], self.writer
        if turn == len(self.turns) - 1:
            asked = self._following(writer.try_render(self.turns, self.tools, ask=True), after)
            # What is written only where nobody asks for more (a last EOS) is no end of a turn.
            reach = len(words) if asked is None else writer.agreement(words, asked)
            reach = reach if writer.control(words, low, reach) else len(words)
            tokens = writer.control(words, low, reach)
        else:
            alone = self._following(writer.try_render(self._before(turn + 1), self.tools), after)
            reach = low if alone is None else max(writer.agreement(words, alone), low)
            tokens = writer.control(words, low, reach)
            if not tokens and alone is not None and writer.control(alone, low):
                # The last turn ends with another token: in the middle it is the first that follows.
                tokens = writer.control(words, low)[:1]
            if not tokens and (alone is None or reach < len(alone)):
                raise ValueError(
                    f"where turn {turn + 1} (assistant) of {roles(self.turns)} ends cannot be told; {HINT}"
                )
        return (tokens[-1][1], tokens[-1][0]) if tokens else (reach, reach)

    def _before(self, turn: int) -> list[Message]:
        """The turns before this one, without the thoughts that are left out here.

        A template that shows them where no later turns follow would hide what is the same.
        """
        return [without_thought(said) if i in self.thoughtless else said for i, said in enumerate(self.turns[:turn])]

    def _following(self, text: str | None, place: int) -> str | None:
        """The rest of another text after the string before the words of that number; None if it is not there."""
        if text is None or not place:
            return text
        _, mark, following = text.partition(closing(self.order[place - 1]))
        return following if mark else None


def is_system(message: Message) -> bool:
    return message["role"] in ("system", "developer")
