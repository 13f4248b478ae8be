"""Messages → the text that a chat template makes of them, and where in it each answer stands.

Answers are found by rendering, never by tokenizing a prompt apart. The conversation is rendered once with a marker in
each turn's place: that yields the template's own words between the turns, and shows a turn that is left out, doubled or
moved. The real text must then be exactly those words with the turns' contents (or the contents without white space at
their ends) between them. A template that words one turn by another's content is taken turn by turn, see `_by_turns`.

An answer begins where the generation prompt ends, or where the two part if the template's generation prompt says more
than its transcript does; it ends with the end-of-turn token. `{% generation %}` marks in the template go first.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Span:
    """Characters `start` to `end` are learned; the end-of-turn token, if there is one, lies from `text_end` on."""

    start: int
    end: int
    text_end: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """A rendered conversation; `open_end` says that its last answer ends without an end-of-turn token."""

    text: str
    answers: list[Span]
    open_end: bool


@dataclass(frozen=True)
class _Skeleton:
    """A template's words around the turns: words[0], turn, words[1], …; answers' borders as (words, offset there)."""

    words: list[str]
    answers: list[tuple[tuple[int, int], tuple[int, int], tuple[int, int]]]  # start, end, text end


class ChatTemplate:
    """A tokenizer's chat template, or the one given.

    Raises:
        ValueError: on use, if there is none.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self._tokenizer, self._given = tokenizer, template
        self._names = dict(tokenizer.special_tokens_map)
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        longest_first = sorted(filter(None, special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._skeletons: dict[Any, _Skeleton] = {}
        self._used: set[str] = set()

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

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None, *, ask: bool = False) -> str:
        """The conversation as text; with `ask`, followed by the generation prompt.

        Raises:
            ValueError: the template rejects it.
        """
        return self._render(messages, tools, ask=ask)[0]

    def conversation(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> Conversation:
        """The conversation's text and its answers' spans.

        Raises:
            ValueError: the template rejects the conversation, or leaves out, changes or moves a turn.
        """
        text, marks = self._render(messages, tools, marks=True)
        key = None if tools else _key(messages)
        skeleton = self._skeletons.get(key) if key else None
        if skeleton is None:
            skeleton = self._skeleton(messages, tools)
            if key:
                self._skeletons[key] = skeleton
        answers = _fit(text, skeleton, messages) or self._by_turns(text, messages, tools)
        if marks:
            answers = [self._marked(text, start, end) for start, end in marks]
        open_end = bool(messages[-1]["role"] == "assistant" and answers)
        if open_end:
            open_end = self._shut(text, answers[-1].start, answers[-1].end) == answers[-1].end
        return Conversation(text, answers, open_end)

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, *, ask: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.source(tools)
        self._used.add(template)
        marks = marks and re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        try:
            texts, found = render_jinja_template(
                [list(messages)],
                tools=list(tools) if tools else None,
                chat_template=template,
                add_generation_prompt=ask,
                return_assistant_tokens_mask=marks,
                **self._names,
            )
        # A template is a program: it fails in its own words (raise_exception) or in Python's.
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the chat template rejects the turns {_roles(messages)}: {reason}") from None
        return texts[0], found[0] if marks else []

    def _skeleton(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> _Skeleton:
        marked = [{**m, "content": _marker(i)} if m["content"].strip() else m for i, m in enumerate(messages)]
        spoken = [i for i, m in enumerate(messages) if m["content"].strip()]
        text = self.render(marked, tools)
        places = {i: text.find(_marker(i)) for i in spoken}
        for i in spoken:
            if text.count(_marker(i)) != 1:
                what = "leaves out" if places[i] < 0 else "repeats"
                raise ValueError(f"the chat template {what} turn {i + 1} ({messages[i]['role']}) of {_roles(messages)}")
        if sorted(places.values()) != list(places.values()):
            raise ValueError(f"the chat template changes the order of the turns {_roles(messages)}")
        borders = [0, *(edge for i in spoken for edge in (places[i], places[i] + len(_marker(i)))), len(text)]
        words = [text[borders[k] : borders[k + 1]] for k in range(0, len(borders), 2)]
        answers = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = sum(1 for j in spoken if j < i)
                origin = borders[2 * before]
                start = self._asked(text, marked, tools, i)
                if i in places:
                    start = places[i] if start is None or start < origin else min(start, places[i])
                    after = places[i] + len(_marker(i))
                    end = self._trimmed(text, after, after + self._tail(text[after:], marked, tools, i))
                    answers.append(((before, start - origin), (before + 1, end - after), (before + 1, 0)))
                else:
                    start = origin if start is None else max(start, origin)
                    end = self._trimmed(text, start, max(self._told(text, marked, tools, i), start))
                    shut = self._shut(text, start, end)
                    answers.append(((before, start - origin), (before, end - origin), (before, shut - origin)))
        return _Skeleton(words, answers)

    def _asked(self, text: str, messages: Sequence[Message], tools: Any, index: int) -> int | None:
        """How far the text agrees with what the turns before `index` and the generation prompt make."""
        try:
            return _common(text, self.render(messages[:index], tools, ask=True))
        except ValueError:  # some templates want a user's turn first
            return None

    def _told(self, text: str, messages: Sequence[Message], tools: Any, index: int) -> int:
        """How far the text agrees with what the turns up to `index` make."""
        try:
            return _common(text, self.render(messages[: index + 1], tools))
        except ValueError:
            return 0

    def _tail(self, rest: str, messages: Sequence[Message], tools: Any, index: int) -> int:
        """How far what follows a turn's content agrees with what follows it when the turn is the last."""
        try:
            return _common(rest, self.render(messages[: index + 1], tools).partition(_marker(index))[2])
        except ValueError:
            return 0

    def _trimmed(self, text: str, start: int, end: int) -> int:
        """The end of the last special token there, beyond which nothing needs to be generated; else `end`."""
        return max((match.end() for match in self._special.finditer(text, start, end)), default=end)

    def _shut(self, text: str, start: int, end: int) -> int:
        """Where the special token that ends `text[start:end]` begins; else `end`."""
        return next((m.start() for m in self._special.finditer(text, start, end) if m.end() == end), end)

    def _marked(self, text: str, start: int, end: int) -> Span:
        """A span that the template marks, with the end-of-turn token that follows it if it does not hold it already."""
        shut = self._shut(text, start, end)
        after = end + len(text[end:]) - len(text[end:].lstrip())
        following = self._special.match(text, after)
        if shut == end and following:
            return Span(start, following.end(), end)
        return Span(start, end, shut)

    def _by_turns(self, text: str, messages: Sequence[Message], tools: Any) -> list[Span]:
        """The answers' spans of a text that the skeleton does not fit, from renders of growing length.

        Raises:
            ValueError: a turn's content is not where its turn is.
        """
        answers, reached = [], 0
        for i, message in enumerate(messages):
            end = len(text) if i == len(messages) - 1 else self._told(text, messages, tools, i)
            if message["content"].strip() not in text[reached:end]:
                raise ValueError(
                    f"the chat template leaves out or changes content of turn {i + 1} ({message['role']}); "
                    "give another in tokenize.chat_template, or mend the row"
                )
            if message["role"] == "assistant":
                asked = self._asked(text, messages, tools, i)
                start = text.find(message["content"].strip(), reached)
                start = start if asked is None or asked < reached else min(start, asked)
                stop = self._trimmed(text, start, end)
                answers.append(Span(start, stop, self._shut(text, start, stop)))
            reached = max(end, reached)
        return answers


def _fit(text: str, skeleton: _Skeleton, messages: Sequence[Message]) -> list[Span] | None:
    """The answers' spans, if the text is the skeleton's words with the turns' contents between them."""
    starts, at = [0], len(skeleton.words[0])
    if not text.startswith(skeleton.words[0]):
        return None
    contents = [message["content"] for message in messages if message["content"].strip()]
    for content, words in zip(contents, skeleton.words[1:], strict=True):
        last = len(starts) == len(contents)
        for said in (content, content.strip(), content.rstrip(), content.lstrip()):
            end = at + len(said)
            if text.startswith(said + words, at) and not (last and len(text) != end + len(words)):
                break
        else:
            return None
        starts.append(end)
        at = end + len(words)

    def place(point: tuple[int, int]) -> int:
        return starts[point[0]] + point[1]

    return [Span(place(start), place(end), place(shut)) for start, end, shut in skeleton.answers]


def _key(messages: Sequence[Message]) -> Any:
    """What the template's words can depend on, or None where that is more than the roles."""
    if any(len(message) > 2 for message in messages):
        return None
    return tuple((message["role"], bool(message["content"].strip())) for message in messages)


def _marker(index: int) -> str:
    return f"xTURNx{index}xTURNx"


def _common(a: str, b: str) -> int:
    return len(os.path.commonprefix([a, b]))  # noqa: RUF071  characters are what is meant


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(str(message["role"]) for message in messages[:12])
