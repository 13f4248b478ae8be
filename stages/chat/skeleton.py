"""A chat template's own words around the strings of a conversation, and where in them each answer begins and ends.

The whole conversation is rendered once with a mark in each string's place (`strings`). What stands between the marks
are the template's words. An answer begins where they stop agreeing with what the turns before it and the generation
prompt make, counted from the string before; it ends with the end-of-turn token after its last string, and what stands
there when the turn is the last one shows which of the words are still its own. Both comparisons look only at words
between two strings, so a block that a template moves with the number of turns moves no border.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from stages.chat.render import roles
from stages.chat.strings import (
    MARK,
    Message,
    String,
    closing,
    marked,
    names_of_calls,
    opening,
    spellings,
    strings_of_tools,
    without_thought,
)

_HINT = "give another in tokenize.chat_template, or mend the row"


@dataclass(frozen=True, slots=True)
class Border:
    """A place in the template's words: so many characters into the words of that number."""

    words: int
    offset: int


@dataclass(frozen=True, slots=True)
class AnswerBorders:
    """Where the answer of a turn begins and ends; from `closes` on there is only the token that ends it."""

    turn: int
    start: Border
    end: Border
    closes: Border


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The template's words: words[0], string, words[1], …; `order`: the strings' numbers in the order of the text.

    `held`: what stands in the strings' places where marks were set around them. `left_out`: thoughts of earlier turns
    that the template renders only in the last one.
    """

    words: tuple[str, ...]
    order: tuple[int, ...]
    held: tuple[str, ...]
    answers: tuple[AnswerBorders, ...]
    left_out: int


@dataclass(frozen=True, slots=True)
class Fit:
    """A text that is a skeleton's words with strings between them: where each of the words begins."""

    begins: tuple[int, ...]
    failed: int | None = None  # the first string that is not there as it should be, so that there are no places

    def place(self, border: Border) -> int:
        return self.begins[border.words] + border.offset


def fit(text: str, skeleton: Skeleton, strings: Sequence[String]) -> Fit:
    """The words' places in the text of a conversation with these strings."""
    if not text.startswith(skeleton.words[0]):
        return Fit((), skeleton.order[0] if skeleton.order else 0)
    begins, at = [0], len(skeleton.words[0])
    for place, number in enumerate(skeleton.order):
        words, last = skeleton.words[place + 1], place == len(skeleton.order) - 1
        forms: Iterable[str] = (skeleton.held[place],) if skeleton.held else spellings(strings[number].text)
        for form in forms:
            end = at + len(form)
            if (
                text.startswith(form, at)
                and text.startswith(words, end)
                and (not last or len(text) == end + len(words))
            ):
                break
        else:
            return Fit((), number)
        begins.append(end)
        at = end + len(words)
    return Fit(tuple(begins), None if at == len(text) else 0)


class SkeletonMaker:
    """Finds skeletons by a template: `render` makes text of turns, tools and whether to ask for an answer."""

    def __init__(
        self, render: Callable[[Sequence[Message], Sequence[Any] | None, bool], str], special: re.Pattern[str]
    ) -> None:
        self._render, self._special = render, special
        self._header: str | None = None

    def skeleton(self, messages: Sequence[Message], tools: Sequence[Any] | None, *, around: bool) -> Skeleton:
        """The template's words around the strings of a conversation.

        Raises:
            ValueError: the template rejects the conversation, or leaves out, repeats or moves something of it.
        """
        turns, strings = marked(messages, around=around)
        text = self._render(turns, tools, False)
        found = list(MARK.finditer(text))
        order = tuple(int(match[1]) for match in found)
        self._check_order(messages, strings, order, text)
        borders = [0, *(edge for match in found for edge in match.span()), len(text)]
        words = tuple(text[borders[k] : borders[k + 1]] for k in range(0, len(borders), 2))
        thoughtless = frozenset(string.turn for number, string in enumerate(strings) if number not in order)
        view = _View(self, turns, tools, words, order, [strings[number].turn for number in order], thoughtless)
        answers = tuple(view.answer(turn) for turn, message in enumerate(turns) if message["role"] == "assistant")
        left_out = self._left_out(view, messages, strings)
        self._check_names(messages, view, answers)
        self._check_tools(turns, tools, text, words, answers)
        held = tuple(match[2] for match in found) if around else ()
        for number, text in zip(order, held, strict=False):
            if text not in spellings(strings[number].text):
                raise ValueError(not_kept(messages, strings[number], changed=True))
        return Skeleton(words, order, held, answers, left_out)

    def header(self) -> str:
        """What the template writes at the start of any answer; "" if that cannot be told."""
        if self._header is None:
            self._header = self._find_header()
        return self._header

    def try_render(self, messages: Sequence[Message], tools: Sequence[Any] | None, *, ask: bool = False) -> str | None:
        """The text, or None where the template rejects these turns, such as none, or no user's turn."""
        try:
            return self._render(messages, tools, ask)
        except ValueError:
            return None

    def agreement(self, one: str, other: str) -> int:
        """How many characters two texts begin with in common; a control token counts whole or not at all."""
        length = len(os.path.commonprefix([one, other]))  # noqa: RUF071  characters are what is meant
        for match in self._special.finditer(one):
            if match.start() < length < match.end():
                return match.start()
        return length

    def control(self, words: str, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
        """The places of control tokens."""
        return [match.span() for match in self._special.finditer(words, start, len(words) if end is None else end)]

    def _find_header(self) -> str:
        talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
        turns, _ = marked(talk, around=False)
        told = self.try_render(turns, None)
        asked, plain = self.try_render(turns[:1], None, ask=True), self.try_render(turns[:1], None)
        if told is None or asked is None or plain is None:
            return ""
        between = told.partition(closing(0))[2].partition(opening(1))[0]
        after = asked.partition(closing(0))[2]
        common = between[: self.agreement(between, after)]
        return common[self.agreement(common, plain.partition(closing(0))[2]) :]

    def _check_order(
        self, messages: Sequence[Message], strings: Sequence[String], order: Sequence[int], text: str
    ) -> None:
        for number, string in enumerate(strings):
            count = order.count(number)
            if count > 1 or (not count and string.kind != "thought"):
                own = [n for n, other in enumerate(strings) if other.turn == string.turn]
                parts = any(opening(n) in text or closing(n) in text for n in own)
                raise ValueError(not_kept(messages, string, repeated=count > 1, changed=parts))
        # A system prompt may stand anywhere, as in the last question.
        turns = [turn for turn in (strings[number].turn for number in order) if not _is_system(messages[turn])]
        if turns != sorted(turns):
            raise ValueError(f"the chat template changes the order of the turns {roles(messages)}; {_HINT}")

    def _left_out(self, view: _View, messages: Sequence[Message], strings: Sequence[String]) -> int:
        """How many thoughts the template leaves out because their turn is not the last.

        Raises:
            ValueError: it leaves one out wherever it stands.
        """
        missing = [n for n, string in enumerate(strings) if string.kind == "thought" and n not in view.order]
        for number in missing:
            string = strings[number]
            alone = view.ending_with(string.turn)
            if alone is None or closing(number) not in alone or string.turn == len(messages) - 1:
                raise ValueError(not_kept(messages, string))
        return len(missing)

    def _check_names(self, messages: Sequence[Message], view: _View, answers: Sequence[AnswerBorders]) -> None:
        for answer in answers:
            said = "\n".join(view.words[answer.start.words : answer.end.words + 1])
            for name in names_of_calls(messages[answer.turn]):
                if not _stands_in(name, said):
                    raise ValueError(not_kept(messages, String(answer.turn, "argument", name), name=name))

    def _check_tools(
        self,
        turns: Sequence[Message],
        tools: Sequence[Any] | None,
        text: str,
        words: Sequence[str],
        answers: Sequence[AnswerBorders],
    ) -> None:
        if not tools:
            return
        hint = "give one that knows them in tokenize.chat_template, or take them out of the row"
        if self.try_render(turns, None) == text:
            raise ValueError(f"the chat template leaves out the tools; {hint}")
        outside = "\n".join(_outside(words, answers))
        for string in strings_of_tools(tools):
            if not _stands_in(string, outside):
                raise ValueError(f"the chat template leaves out {string[:40]!r} of the tools; {hint}")


@dataclass(frozen=True, slots=True)
class _View:
    """A conversation rendered with marks: the words, and each string's number and turn in the order of the text."""

    maker: SkeletonMaker
    turns: Sequence[Message]
    tools: Sequence[Any] | None
    words: tuple[str, ...]
    order: tuple[int, ...]
    owners: Sequence[int]
    thoughtless: frozenset[int]  # turns with a thought that is left out

    def ending_with(self, turn: int) -> str | None:
        """The text of the turns up to this one."""
        return self.maker.try_render(self.turns[: turn + 1], self.tools)

    def answer(self, turn: int) -> AnswerBorders:
        """The borders of an assistant's turn.

        Raises:
            ValueError: the template gives it no words at all.
        """
        own = [place for place, owner in enumerate(self.owners) if owner == turn]
        earlier = [k for k, owner in enumerate(self.owners) if owner < turn and not _is_system(self.turns[owner])]
        before = own[0] if own else max(earlier, default=-1) + 1
        after = own[-1] + 1 if own else before
        start = self._start(turn, before)
        low = start if before == after else 0
        end, closes = self._end(turn, after, low)
        if before == after and end <= start:
            raise ValueError(
                f"the chat template says nothing in turn {turn + 1} (assistant) of {roles(self.turns)}; {_HINT}"
            )
        return AnswerBorders(turn, Border(before, start), Border(after, end), Border(after, closes))

    def _start(self, turn: int, before: int) -> int:
        """How far into the words before the turn's first string its header reaches."""
        words, maker = self.words[before], self.maker
        asked = maker.try_render(self.turns[:turn], self.tools, ask=True) if before else None
        following = self._following(asked, before)
        start = None if following is None else maker.agreement(words, following)
        header = maker.header()
        if header and header not in words[: start or 0] and header in words:
            return words.rindex(header) + len(header)
        if start is None and turn not in self.owners:
            raise ValueError(f"where turn {turn + 1} (assistant) of {roles(self.turns)} begins cannot be told; {_HINT}")
        return len(words) if start is None else start

    def _end(self, turn: int, after: int, low: int) -> tuple[int, int]:
        """How far into the words after the turn's last string its own reach, and where its end-of-turn token begins."""
        words, maker = self.words[after], self.maker
        if turn == len(self.turns) - 1:
            asked = self._following(maker.try_render(self.turns, self.tools, ask=True), after)
            # What is written only where nobody asks for more (a last EOS) is no end of a turn.
            reach = len(words) if asked is None else maker.agreement(words, asked)
            reach = reach if maker.control(words, low, reach) else len(words)
            tokens = maker.control(words, low, reach)
        else:
            # A thought that is left out here but not where the turn is the last would hide what is the same.
            last = without_thought(self.turns[turn]) if turn in self.thoughtless else self.turns[turn]
            alone = self._following(maker.try_render([*self.turns[:turn], last], self.tools), after)
            reach = low if alone is None else max(maker.agreement(words, alone), low)
            tokens = maker.control(words, low, reach)
            if not tokens and alone is not None and maker.control(alone, low):
                # The last turn ends with another token: in the middle it is the first that follows.
                tokens = maker.control(words, low)[:1]
            if not tokens and (alone is None or reach < len(alone)):
                raise ValueError(
                    f"where turn {turn + 1} (assistant) of {roles(self.turns)} ends cannot be told; {_HINT}"
                )
        return (tokens[-1][1], tokens[-1][0]) if tokens else (reach, reach)

    def _following(self, text: str | None, place: int) -> str | None:
        """What follows the string before the words of that number in another text, if the string is there."""
        if text is None or not place:
            return text
        _, mark, following = text.partition(closing(self.order[place - 1]))
        return following if mark else None


def _is_system(message: Message) -> bool:
    return message["role"] in ("system", "developer")


def not_kept(
    messages: Sequence[Message], string: String, *, repeated: bool = False, changed: bool = False, name: str = ""
) -> str:
    """The message for a string that the template does not keep."""
    turn = f"turn {string.turn + 1} ({messages[string.turn]['role']})"
    if repeated:
        return f"the chat template repeats {turn} of {roles(messages)}; {_HINT}"
    if string.kind == "argument":
        return (
            f"the chat template leaves out the tool calls of {turn} of {roles(messages)}"
            f"{f' ({name[:40]!r})' if name else ''}; give one that knows them in tokenize.chat_template"
        )
    if string.kind == "thought":
        return (
            f"the chat template leaves out or changes content of {turn}: its thought; give one that knows thoughts "
            "in tokenize.chat_template, or set tokenize.thoughts: drop"
        )
    if changed:
        return f"the chat template leaves out or changes content of {turn}; {_HINT}"
    return f"the chat template leaves out {turn} of {roles(messages)}; {_HINT}"


def _outside(words: Sequence[str], answers: Sequence[AnswerBorders]) -> Iterable[str]:
    """The words that are in no answer."""
    at = Border(0, 0)
    for answer in answers:
        yield from _between(words, at, answer.start)
        at = answer.end
    yield from _between(words, at, Border(len(words) - 1, len(words[-1])))


def _between(words: Sequence[str], start: Border, end: Border) -> Iterable[str]:
    if start.words == end.words:
        yield words[start.words][start.offset : end.offset]
        return
    yield words[start.words][start.offset :]
    yield from words[start.words + 1 : end.words]
    yield words[end.words][: end.offset]


def _stands_in(string: str, text: str) -> bool:
    """Whether a template wrote the string there, in any form, lines broken anew or not."""
    if not string.strip():
        return True
    if any(form in text for form in spellings(string)):
        return True
    return " ".join(string.split()) in " ".join(text.split())
