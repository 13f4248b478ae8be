"""Messages → the text that a chat template makes of them, and where in it each answer stands.

The conversation is rendered once. Where its strings stand in that text is known from the template's words around them
(`skeleton`), which depend on roles, tools and which strings there are, and are kept for the next such conversation. A
template that words one turn by another's content gets marks around the real strings instead. `{% generation %}` marks
in the template go first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from stages.templating.borders import Writer
from stages.templating.control import ControlTokens
from stages.templating.render import Render, render
from stages.templating.skeleton import TOOLS_LEFT_OUT, Fit, Skeleton, SkeletonMaker, fit, not_kept
from stages.templating.strings import Message, String, marked

_SKELETONS = 512  # kept at a time
Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Span:
    """Characters `start` to `end` are learned; the end-of-turn token, if there is one, lies from `text_end` on."""

    start: int
    end: int
    text_end: int


@dataclass(frozen=True, slots=True)
class Answer:
    """An assistant's turn: what is learned of it, and the characters of its thoughts."""

    turn: int
    spans: tuple[Span, ...]
    thoughts: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A rendered conversation.

    `strings`: the characters of each turn's strings. `open_end`: the last answer ends without an end-of-turn token.
    `thoughts_left_out`: thoughts that the template renders in the last turn only, and that stood in another.
    """

    text: str
    answers: tuple[Answer, ...]
    strings: tuple[tuple[Range, ...], ...]
    open_end: bool
    thoughts_left_out: int


class ChatTemplate:
    """A tokenizer's chat template, or the one given; `date` is the day that it sees, such as 2026-01-31.

    Raises:
        ValueError: on use, if there is none.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        *,
        date: str,
        control: ControlTokens,
        calls_as_text: bool = False,
    ) -> None:
        self._tokenizer, self._given, self._date, self._control = tokenizer, template, date, control
        self._calls_as_text = calls_as_text
        self._names = dict(tokenizer.special_tokens_map)
        self._writer = Writer(lambda turns, tools, ask: self._render(turns, tools, ask).text, control.pattern)
        self._maker = SkeletonMaker(self._writer)
        self._skeleton = lru_cache(_SKELETONS)(self._make_skeleton)
        self._used: set[str] = set()

    @cached_property
    def _with_calls_as_text(self) -> ChatTemplate:
        """The same template, which is given the arguments of tool calls as JSON text."""
        return ChatTemplate(self._tokenizer, self._given, date=self._date, control=self._control, calls_as_text=True)

    @property
    def used_hash(self) -> str:
        """Hex sha256 of the template, or templates, used so far; "" if there were none."""
        return hashlib.sha256("\0".join(sorted(self._used)).encode()).hexdigest() if self._used else ""

    def source(self, tools: Sequence[Any] | None = None) -> str:
        """The template's text."""
        if self._given is not None:
            return self._given
        try:
            return str(self._tokenizer.get_chat_template(tools=list(tools) if tools else None))
        except ValueError:
            raise ValueError(
                "the tokenizer has no chat template; give one in tokenize.chat_template, or a prepare.template"
            ) from None

    def ask(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> str:
        """The conversation as text, followed by the generation prompt.

        Raises:
            ValueError: the template rejects it, or leaves out the tools.
        """
        if self._wants_calls_as_text(messages, tools):
            return self._with_calls_as_text.ask(messages, tools)
        text = self._render(messages, tools, True).text
        if tools and self._writer.try_render(messages, None, ask=True) == text:
            raise ValueError(TOOLS_LEFT_OUT)
        return text

    def conversation(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> Conversation:
        """The conversation's text and its answers.

        Raises:
            ValueError: the template rejects the conversation, or leaves out, changes or moves something of it.
        """
        try:
            return self._conversation(messages, tools)
        except ValueError:
            if not self._wants_calls_as_text(messages, tools):
                raise
            return self._with_calls_as_text.conversation(messages, tools)

    def _wants_calls_as_text(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> bool:
        """True if these turns are rendered whole only with the arguments of their tool calls as JSON text."""
        if self._calls_as_text or not any(message.get("tool_calls") for message in messages):
            return False
        with suppress(ValueError):
            self._conversation(messages, tools)
            return False
        with suppress(ValueError):
            self._with_calls_as_text._conversation(messages, tools)
            return True
        return False

    def _conversation(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> Conversation:
        made = self._render(messages, tools, False)
        turns, strings = marked(messages, around=False)
        try:
            skeleton = self._skeleton(json.dumps([turns, tools], ensure_ascii=False))
            found = fit(made.text, skeleton, strings)
        except ValueError as error:
            problem = str(error)
        else:
            if found.failed is None:
                return self._located(made, skeleton, found, messages, strings)
            problem = not_kept(messages, strings[found.failed], changed=True)
        # The template words a turn by a content: it has to see the contents.
        strings = marked(messages, around=True)[1]
        try:
            skeleton = self._maker.skeleton(messages, tools, around=True)
        except ValueError:
            raise ValueError(problem) from None
        found = fit(made.text, skeleton, strings)
        if found.failed is not None:
            raise ValueError(problem)
        return self._located(made, skeleton, found, messages, strings)

    def _render(self, messages: Sequence[Message], tools: Sequence[Any] | None, ask: bool) -> Render:
        template = self.source(tools)
        self._used.add(template)
        return render(
            template,
            messages,
            tools,
            ask=ask,
            date=self._date,
            names=self._names,
            calls_as_text=self._calls_as_text,
        )

    def _make_skeleton(self, key: str) -> Skeleton:
        turns, tools = json.loads(key)
        return self._maker.skeleton(turns, tools, around=False)

    def _located(
        self, made: Render, skeleton: Skeleton, found: Fit, messages: Sequence[Message], strings: Sequence[String]
    ) -> Conversation:
        """The answers of a text, now that the words' places in it are known."""
        places: list[list[Range]] = [[] for _ in messages]
        thoughts: list[list[Range]] = [[] for _ in messages]
        for place, number in enumerate(skeleton.order):
            where = found.begins[place] + len(skeleton.words[place]), found.begins[place + 1]
            places[strings[number].turn].append(where)
            if strings[number].kind == "thought":
                thoughts[strings[number].turn].append(where)
        answers = []
        for borders in skeleton.answers:
            span = Span(*(found.place(border) for border in (borders.start, borders.end, borders.closes)))
            spans: tuple[Span, ...] = (span,)
            if made.generated is not None:
                spans = self._generated(
                    made, span, borders.turn, set(places[borders.turn]) - set(thoughts[borders.turn])
                )
            answers.append(Answer(borders.turn, spans, tuple(thoughts[borders.turn])))
        last = answers[-1].spans[-1] if answers and messages[-1]["role"] == "assistant" else None
        open_end = last is not None and last.text_end == last.end
        return Conversation(made.text, tuple(answers), tuple(map(tuple, places)), open_end, skeleton.left_out)

    def _generated(self, made: Render, whole: Span, turn: int, said: set[Range]) -> tuple[Span, ...]:
        """The parts of an answer that the template marks, with the end-of-turn token that follows.

        Raises:
            ValueError: the marks leave out what the turn says.
        """
        marks = [(a, b) for a, b in made.generated or () if a < whole.end and b > whole.start and a < b]
        if not marks or not all(any(a <= start and end <= b for a, b in marks) for start, end in said):
            raise ValueError(
                f"the chat template's generation marks leave out turn {turn + 1} (assistant); "
                "give another in tokenize.chat_template"
            )
        spans = [Span(a, b, b) for a, b in marks]
        end = spans[-1].end
        closed = next((m for m in self._control.pattern.finditer(made.text, *marks[-1]) if m.end() == end), None)
        after = end + len(made.text[end:]) - len(made.text[end:].lstrip())
        following = self._control.pattern.match(made.text, after)
        if closed:
            spans[-1] = Span(spans[-1].start, end, closed.start())
        elif following and following.end() <= whole.end:  # and no start of the next turn
            spans[-1] = Span(spans[-1].start, following.end(), end)
        return tuple(spans)
