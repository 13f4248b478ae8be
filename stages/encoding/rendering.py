"""Prepared rows → text, and the characters of it that are learned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.encoding import markers
from stages.params import schema
from stages.prepared.row import PreparedRow
from stages.templating.strings import Message, without_thought
from stages.templating.template import Answer, ChatTemplate, Conversation, Range, Span
from stages.templating.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row's text and what of it is learned.

    `coded` is the text with the control tokens hidden that the row spells (`chat.control`); None: it spells none.
    `answer` is where the part begins that truncation spares; `answers` are the characters of each answer of a
    conversation that is learned; `counts` go into the ledger.
    """

    text: str
    coded: str | None
    spans: tuple[Span, ...]
    answer: int
    special: bool  # the tokenizer adds its own special tokens (BOS)
    eos: bool  # EOS is appended and trained
    answers: tuple[Range, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)


class Renderer:
    """Makes text of rows, under the `tokenize` section of params.yaml."""

    def __init__(self, tokenizer: Any, text_tokenizer: TextTokenizer, options: schema.Tokenize) -> None:
        self._options, self._text_tokenizer, self._control = options, text_tokenizer, text_tokenizer.control
        self.chat = ChatTemplate(tokenizer, options.chat_template, date=options.date, control=self._control)

    def render(self, row: PreparedRow) -> Rendered:
        """The text of a row.

        Raises:
            ValueError: the chat template or the answer marker does not fit the row.
        """
        return self._render_text(row) if row.messages is None else self._render_chat(row.messages, row.tools)

    def _render_text(self, row: PreparedRow) -> Rendered:
        text = row.text if row.text is not None else f"{row.prompt}{row.completion}"
        coded = self._hidden_text(text)
        ranges = [(len(row.prompt or ""), len(text))] if row.text is None else self._marked(text)
        answer = ranges[-1][0]
        if self._options.train_on == "all":
            ranges = [(0, len(text))]
        elif self._options.train_on == "last_assistant":
            ranges = ranges[-1:]
        return Rendered(
            text,
            coded,
            tuple(Span(start, end, end) for start, end in ranges if text[start:end].strip()),
            answer,
            special=self._text_tokenizer.adds_bos(text),
            eos=self._options.add_eos and ranges[-1][1] == len(text),
            counts={"special_in_content": 1} if coded else {},
        )

    def _marked(self, text: str) -> list[Range]:
        """The answers of a plain text; all of it where nothing marks them."""
        marker = self._options.answer_marker
        if marker is None:
            return [(0, len(text))]
        found = markers.answers(text, marker, self._options.question_marker)
        if not found and self._options.train_on != "all":
            raise ValueError(f"has no {marker!r}, which tokenize.answer_marker names; correct the row or the marker")
        return found or [(0, len(text))]

    def _hidden_text(self, text: str) -> str | None:
        if self._options.special_in_content == "allow" or not self._control.spelled(text):
            return None
        coded = self._text_tokenizer.hide_control(text)
        if coded != text and self._options.special_in_content == "error":
            raise ValueError(_spells(self._control.spelled(text), ""))
        return coded if coded != text else None

    def _render_chat(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> Rendered:
        turns = [dict(message) for message in messages]
        if self._options.thoughts == "drop":
            turns = [_thoughtless(turn, number) for number, turn in enumerate(turns, start=1)]
        spells = self._options.special_in_content != "allow" and self._spells(turns, tools)
        if spells:
            turns, tools = self._control.hide(turns), self._control.hide(list(tools)) if tools else tools
        found = self.chat.conversation(turns, tools)
        unlearned = {i for i, turn in enumerate(turns) if turn.get("train") is False}
        chosen = found.answers[-1:] if self._options.train_on == "last_assistant" else found.answers
        learned = [answer for answer in chosen if answer.turn not in unlearned]
        masked = sum(answer.turn in unlearned for answer in found.answers)
        if self._options.train_on == "all":
            spans = _without([Span(0, len(found.text), len(found.text))], _holes(found, unlearned))
        else:
            spans = [span for answer in learned for span in answer.spans]
        if self._options.thoughts == "mask":
            spans = _without(spans, [thought for answer in found.answers for thought in answer.thoughts])
        last = found.answers[-1] if found.answers else None
        return Rendered(
            self._control.show(found.text) if spells else found.text,
            found.text if spells else None,
            tuple(spans),
            learned[-1].spans[0].start if learned else 0,
            special=False,  # the template writes BOS, if the model wants one
            eos=self._options.add_eos and found.open_end and last in learned,
            answers=tuple((answer.spans[0].start, answer.spans[-1].end) for answer in learned),
            counts={
                "assistant_turns": len(found.answers),
                "answers_masked": masked,
                "answers_before_last": len(found.answers) - masked - len(learned),
                "thoughts_left_out": found.thoughts_left_out,
                "special_in_content": int(spells),
            },
        )

    def _spells(self, turns: Sequence[Message], tools: Sequence[Any] | None) -> bool:
        """True if a turn or a tool spells a control token.

        Raises:
            ValueError: one does, and params.yaml makes that an error.
        """
        for i, turn in enumerate(turns):
            if token := self._control.spelled(turn):
                if self._options.special_in_content == "error":
                    raise ValueError(_spells(token, f" in turn {i + 1} ({turn['role']})"))
                return True
        token = self._control.spelled(list(tools)) if tools else None
        if token and self._options.special_in_content == "error":
            raise ValueError(_spells(token, " in its tools"))
        return token is not None


def _thoughtless(turn: Message, number: int) -> Message:
    """The turn without its thought.

    Raises:
        ValueError: nothing of it is left: the model would learn to say nothing.
    """
    left = without_thought(turn)
    if left != turn and not left["content"].strip() and not left.get("tool_calls"):
        raise ValueError(
            f"turn {number} ({turn['role']}) holds only a thought, which tokenize.thoughts: drop takes out; mend the "
            "row, or take it out"
        )
    return left


def _spells(token: str | None, where: str) -> str:
    return f"spells the control token {token}{where}; correct the row, or set tokenize.special_in_content: text"


def _holes(found: Conversation, unlearned: Iterable[int]) -> list[Range]:
    """The characters of turns that are not learned though everything else is."""
    answers: dict[int, Answer] = {answer.turn: answer for answer in found.answers}
    holes: list[Range] = []
    for turn in unlearned:
        if turn in answers:
            holes += [(span.start, span.end) for span in answers[turn].spans]
        else:
            holes += found.strings[turn]
    return holes


def _without(spans: Sequence[Span], holes: Iterable[Range]) -> list[Span]:
    """The spans without the characters of some ranges."""
    kept = list(spans)
    for low, high in holes:
        cut = []
        for span in kept:
            if high <= span.start or span.end <= low:
                cut.append(span)
                continue
            if span.start < low:
                cut.append(Span(span.start, low, min(span.text_end, low)))
            if high < span.end:
                cut.append(Span(high, span.end, max(span.text_end, high)))
        kept = cut
    return kept
