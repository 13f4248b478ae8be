"""A chat template's own words around the strings of a conversation, which are checked to be all there.

The whole conversation is rendered once with a mark in each string's place (`strings`): what stands between the marks
are the template's words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from stages.templating.borders import HINT, AnswerBorders, Border, View, Writer, is_system
from stages.templating.render import roles
from stages.templating.strings import (
    MARK,
    Message,
    String,
    closing,
    marked,
    names_of_calls,
    opening,
    spellings,
    strings_of_tools,
)

_KNOWS_TOOLS = "give one that knows them in tokenize.chat_template, or take them out of the row"
TOOLS_LEFT_OUT = f"the chat template leaves out the tools; {_KNOWS_TOOLS}"


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
    """Finds skeletons by what a template writes around the strings."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def skeleton(self, messages: Sequence[Message], tools: Sequence[Any] | None, *, around: bool) -> Skeleton:
        """The template's words around the strings of a conversation.

        Raises:
            ValueError: the template rejects the conversation, or leaves out, repeats or moves something of it.
        """
        turns, strings = marked(messages, around=around)
        text = self._writer.render(turns, tools)
        found = list(MARK.finditer(text))
        order = tuple(int(match[1]) for match in found)
        self._check_order(messages, strings, order, text)
        borders = [0, *(edge for match in found for edge in match.span()), len(text)]
        words = tuple(text[borders[k] : borders[k + 1]] for k in range(0, len(borders), 2))
        thoughtless = frozenset(string.turn for number, string in enumerate(strings) if number not in order)
        view = View(self._writer, turns, tools, words, order, [strings[number].turn for number in order], thoughtless)
        answers = tuple(view.answer(turn) for turn, message in enumerate(turns) if message["role"] == "assistant")
        left_out = self._left_out(view, messages, strings)
        self._check_names(messages, view, answers)
        self._check_tools(turns, tools, text, words, answers)
        held = tuple(match[2] for match in found) if around else ()
        for number, text in zip(order, held, strict=False):
            if text not in spellings(strings[number].text):
                raise ValueError(not_kept(messages, strings[number], changed=True))
        return Skeleton(words, order, held, answers, left_out)

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
        turns = [turn for turn in (strings[number].turn for number in order) if not is_system(messages[turn])]
        if turns != sorted(turns):
            raise ValueError(f"the chat template changes the order of the turns {roles(messages)}; {HINT}")

    def _left_out(self, view: View, messages: Sequence[Message], strings: Sequence[String]) -> int:
        """Count the thoughts that the template leaves out because their turn is not the last.

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

    def _check_names(self, messages: Sequence[Message], view: View, answers: Sequence[AnswerBorders]) -> None:
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
        if self._writer.try_render(turns, None) == text:
            raise ValueError(TOOLS_LEFT_OUT)
        outside = "\n".join(_outside(words, answers))
        for string in strings_of_tools(tools):
            if not _stands_in(string, outside):
                raise ValueError(f"the chat template leaves out {string[:40]!r} of the tools; {_KNOWS_TOOLS}")


def not_kept(
    messages: Sequence[Message], string: String, *, repeated: bool = False, changed: bool = False, name: str = ""
) -> str:
    """The message for a string that the template does not keep."""
    turn = f"turn {string.turn + 1} ({messages[string.turn]['role']})"
    if repeated:
        return f"the chat template repeats {turn} of {roles(messages)}; {HINT}"
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
        return f"the chat template leaves out or changes content of {turn}; {HINT}"
    return f"the chat template leaves out {turn} of {roles(messages)}; {HINT}"


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
    """True if a template wrote the string there, in any of its forms; line breaks may differ."""
    if not string.strip():
        return True
    if any(form in text for form in spellings(string)):
        return True
    return " ".join(string.split()) in " ".join(text.split())
