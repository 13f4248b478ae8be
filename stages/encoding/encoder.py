"""Prepared rows → token ids and the loss mask.

The mask comes from characters: each token of the whole text that overlaps what is to be learned is trained on, one that
spans the border between prompt and answer too. No prompt is ever tokenized apart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, TypeVar

import numpy as np

from stages.chat.template import ChatTemplate, Span
from stages.chat.tokenizer import TextTokenizer
from stages.encoding import offsets
from stages.prepared.row import PreparedRow
from stages.tokens.row import TokenRow

_BATCH_ROWS = 512  # rows the tokenizer encodes at a time, on all cores
_BATCHES_AHEAD = 2

Reason = Literal["bad", "too_long", "nothing_to_learn"]
REASONS: tuple[Reason, ...] = ("bad", "too_long", "nothing_to_learn")
T = TypeVar("T")
R = TypeVar("R")


@dataclass(slots=True)
class Encoded:
    """What became of one prepared row: token rows (several if it was split), or the reason why there are none."""

    source: str
    rows: list[TokenRow] = field(default_factory=list)
    length: int = 0  # tokens before anything was cut
    characters: int = 0
    reason: Reason | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A row's text and what of it is learned. `answer` is where the part begins that truncation spares."""

    text: str
    spans: list[Span]
    answer: int
    special: bool  # the tokenizer adds its own special tokens (BOS)
    eos: bool  # EOS is appended and trained


@dataclass(slots=True)
class _Job:
    """A row on its way: rendered, or with the problem that it has; then encoded."""

    row: PreparedRow
    rendered: _Rendered | None
    problem: str = ""
    encoding: Any = None
    ends: bool = False  # with a trained EOS
    appended: bool = False  # which the text itself does not end with
    first_bytes: int = 0  # of the first token, which is never trained on


@dataclass(slots=True)
class _Positions:
    """Of a batch's tokens: where each ends and how long it is, in bytes; of its rows: the start, and if that holds."""

    ends: np.ndarray
    lengths: np.ndarray
    before: list[int]
    fits: list[bool]


_EDGES = (offsets.first_token, offsets.end_token)


class Encoder:
    """Prepared rows → token rows, under the `tokenize` section of params.yaml."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        train_on: Literal["all", "completion", "assistant", "last_assistant"],
        over_length: Literal["truncate", "drop", "split", "error"] = "truncate",
        overlap: int = 0,
        answer_marker: str | None = None,
        chat_template: str | None = None,
        add_eos: bool = True,
    ) -> None:
        self.chat = ChatTemplate(tokenizer, chat_template)
        self.tokenizer = TextTokenizer(tokenizer)
        self.backend = self.tokenizer.backend
        self._byte_lengths = offsets.byte_lengths(self.backend)
        self._max_length, self._over_length, self._overlap = max_length, over_length, max(overlap, 1)
        self._train_on, self._marker, self._add_eos = train_on, answer_marker, add_eos

    def encode(self, rows: Iterable[PreparedRow]) -> Iterator[Encoded]:
        """What becomes of each row, in their order. The next batches are encoded while the caller uses this one's."""
        for batch in _ahead(self._encode_batch, _batches(rows, _BATCH_ROWS)):
            yield from self._finish(batch)

    @property
    def template_hash(self) -> str:
        """Hex sha256 of the chat template that conversations so far were rendered with; "" if there were none."""
        return self.chat.used_hash

    def _encode_batch(self, rows: Sequence[PreparedRow]) -> list[_Job]:
        jobs = [self._render(row) for row in rows]
        encode_batch = self.backend.encode_batch if self._byte_lengths is None else self.backend.encode_batch_fast
        for special in (True, False):
            chosen = [job for job in jobs if job.rendered and job.rendered.special is special]
            if chosen:
                texts = [job.rendered.text for job in chosen if job.rendered]
                for job, encoding in zip(chosen, encode_batch(texts, add_special_tokens=special), strict=True):
                    job.encoding = encoding
        return jobs

    def _render(self, row: PreparedRow) -> _Job:
        try:
            return _Job(row, self._render_text(row) if row.messages is None else self._render_chat(row))
        except ValueError as error:
            return _Job(row, None, str(error))

    def _render_text(self, row: PreparedRow) -> _Rendered:
        if row.text is None:
            assert row.prompt is not None and row.completion is not None  # noqa: S101
            text, answer = row.prompt + row.completion, len(row.prompt)
        else:
            text, answer = row.text, 0
            if self._marker is not None:
                found = text.find(self._marker)
                if found < 0 and self._train_on != "all":
                    marker = repr(self._marker)
                    raise ValueError(f"has no {marker}, which tokenize.answer_marker names; mend the row or the marker")
                answer = found + len(self._marker) if found >= 0 else 0
        start = 0 if self._train_on == "all" else answer
        spans = [Span(start, len(text), len(text))] if text[start:].strip() else []
        return _Rendered(text, spans, answer, special=self.tokenizer.adds_bos(text), eos=self._add_eos)

    def _render_chat(self, row: PreparedRow) -> _Rendered:
        assert row.messages is not None  # noqa: S101
        found = self.chat.conversation(row.messages, row.tools)
        spans = found.answers
        answer = spans[-1].start if spans else 0
        if self._train_on == "last_assistant":
            spans = spans[-1:]
        elif self._train_on == "all":
            spans = [Span(0, len(found.text), len(found.text))]
        # The template writes BOS, if the model wants one.
        return _Rendered(found.text, spans, answer, special=False, eos=self._add_eos and found.open_end)

    def _finish(self, jobs: Sequence[_Job]) -> list[Encoded]:
        """Ids and masks of a batch, in one array each: per-row arrays would cost as much as the encoding."""
        values = [self._values(job) for job in jobs]
        ids = np.fromiter(chain.from_iterable(values), dtype=np.int32)
        borders = np.concatenate([[0], np.cumsum([len(row) for row in values])])
        begins = borders.tolist()
        mask = self._mask(jobs, ids, begins)
        mask[borders[:-1][np.diff(borders) > 0]] = False
        trained = np.concatenate([[0], np.cumsum(mask)])[borders]
        counts = np.diff(trained).tolist()
        return [
            self._result(job, ids[begin:end], mask[begin:end], count)
            for job, begin, end, count in zip(jobs, begins, begins[1:], counts, strict=False)
        ]

    def _mask(self, jobs: Sequence[_Job], ids: np.ndarray, begins: list[int]) -> np.ndarray:
        """The tokens that overlap a span, and each EOS at the end of one."""
        mask = np.zeros(len(ids), dtype=bool)
        located = self._positions(jobs, ids, begins)
        starts, stops = [], []
        for i, (job, begin, end) in enumerate(zip(jobs, begins, begins[1:], strict=False)):
            if not job.rendered or not job.rendered.spans:
                continue
            text = job.rendered.text
            if located and located.fits[i]:
                job.first_bytes = int(located.lengths[begin])
                for span in job.rendered.spans:
                    starts.append(located.before[i] + offsets.size(text, span.start))
                    stops.append(located.before[i] + offsets.size(text, span.end))
            else:
                encoding = self._located(job)
                job.first_bytes = offsets.size(text, offsets.place(encoding, 0, 1, 0))
                for span in job.rendered.spans:
                    first, last = (f(encoding, c, text) for f, c in zip(_EDGES, (span.start, span.end), strict=True))
                    mask[begin + first : min(begin + last, end)] = True
            if job.ends:
                mask[end - 1] = True
        if located:
            firsts = np.searchsorted(located.ends, starts, side="right").tolist()
            lasts = np.searchsorted(located.ends, stops, side="left").tolist()
            for first, last in zip(firsts, lasts, strict=True):
                mask[first : last + 1] = True
        return mask

    def _positions(self, jobs: Sequence[_Job], ids: np.ndarray, begins: list[int]) -> _Positions | None:
        """Where each token of a batch ends, in bytes, if the tokenizer's are known."""
        if self._byte_lengths is None:
            return None
        lengths = self._byte_lengths[ids]
        for job, begin, end in zip(jobs, begins, begins[1:], strict=False):
            # What was added to the text stands for none of its bytes.
            if job.ends and job.appended:
                lengths[end - 1] = 0
            if job.rendered and job.rendered.special:
                lengths[begin : begin + self.tokenizer.prefix] = 0
        ends = np.cumsum(lengths)
        before = np.concatenate([[0], ends])[begins].tolist()
        fits = [
            job.rendered is not None and stop - start == offsets.size(job.rendered.text)
            for job, start, stop in zip(jobs, before, before[1:], strict=False)
        ]
        return _Positions(ends, lengths, before, fits)

    def _located(self, job: _Job) -> Any:
        """The row's encoding with offsets."""
        if self._byte_lengths is None or not job.rendered:
            return job.encoding
        return self.backend.encode(job.rendered.text, add_special_tokens=job.rendered.special)

    def _values(self, job: _Job) -> list[int]:
        """A row's token ids, EOS at their end if it belongs there."""
        if not job.rendered:
            return []
        values: list[int] = job.encoding.ids
        if job.rendered.special and self.tokenizer.suffix:
            del values[-self.tokenizer.suffix :]  # whether there is an EOS is add_eos's to say
        job.ends = bool(job.rendered.eos and job.rendered.spans)
        if job.ends and not (values and values[-1] == self.tokenizer.eos):
            values.append(self.tokenizer.eos)
            job.appended = True
        return values

    def _result(self, job: _Job, ids: np.ndarray, mask: np.ndarray, trained: int) -> Encoded:
        """What becomes of a row, now that its length is known."""
        row, rendered = job.row, job.rendered
        if not rendered:
            return Encoded(row.source, reason="bad", message=f"{row.source}: {job.problem}")
        length, characters = len(ids), len(rendered.text)
        if not trained:
            return Encoded(row.source, [], length, characters, "nothing_to_learn")
        if length <= self._max_length:
            size = sum(offsets.size(rendered.text[span.start : span.text_end]) for span in rendered.spans)
            size -= job.first_bytes if rendered.spans[0].start == 0 else 0
            return Encoded(row.source, [TokenRow(row.id, row.source, ids, mask, size, False)], length, characters)
        if self._over_length in ("drop", "error"):
            message = (
                f"{row.source}: has {length} tokens; raise tokenize.max_length ({self._max_length}) "
                "or set tokenize.over_length: truncate"
            )
            return Encoded(row.source, [], length, characters, "too_long", message)
        job.encoding = self._located(job)
        cut = self._windows if self._over_length == "split" and row.text is not None else self._truncate
        rows = list(cut(job, ids, mask))
        return Encoded(row.source, rows, length, characters, None if rows else "nothing_to_learn")

    def _truncate(self, job: _Job, ids: np.ndarray, mask: np.ndarray) -> Iterator[TokenRow]:
        """All but the start of the prompt, and only when the prompt is gone, without the end of the answer."""
        assert job.rendered  # noqa: S101
        # One token must precede the first of the answer, to predict it from.
        limit = max(offsets.first_token(job.encoding, job.rendered.answer, job.rendered.text) - 1, 0)
        first = min(len(ids) - self._max_length, limit)
        kept = np.arange(first, first + self._max_length)
        if job.rendered.special and self.tokenizer.prefix:
            kept[0] = 0  # a model that was trained with BOS at the start is lost without it
        kept_mask = mask[kept]
        kept_mask[0] = False
        if kept_mask.any():
            yield _token_row(job, ids[kept], kept_mask, first, truncated=True)

    def _windows(self, job: _Job, ids: np.ndarray, mask: np.ndarray) -> Iterator[TokenRow]:
        """Windows over a text. What one repeats from the one before is context: no token is trained on twice."""
        first = number = 0
        while True:
            kept = mask[first : first + self._max_length].copy()
            kept[: self._overlap if first else 1] = False
            if kept.any():
                yield _token_row(job, ids[first : first + len(kept)], kept, first, window=number)
                number += 1
            if first + self._max_length >= len(ids):
                return
            first += self._max_length - self._overlap


def _token_row(
    job: _Job, ids: np.ndarray, mask: np.ndarray, first: int, *, truncated: bool = False, window: int | None = None
) -> TokenRow:
    """The token row of a cut row's tokens from `first` on, with the bytes of text that its mask covers."""
    assert job.rendered  # noqa: S101
    text, trained = job.rendered.text, np.flatnonzero(mask)
    low = offsets.place(job.encoding, first + int(trained[0]), 0, len(text))
    high = offsets.place(job.encoding, first + int(trained[-1]), 1, len(text))
    size = 0
    for span in job.rendered.spans:
        size += offsets.size(text[max(span.start, low) : min(span.text_end, high)])
    name = job.row.id if window is None else f"{job.row.id}-{window}"
    return TokenRow(name, job.row.source, ids, mask, size, truncated)


def _batches(rows: Iterable[PreparedRow], size: int) -> Iterator[Sequence[PreparedRow]]:
    batch: list[PreparedRow] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _ahead(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """The results of `work` in order, some computed ahead in a thread: the tokenizer does not hold Python's lock."""
    with ThreadPoolExecutor(1) as pool:
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > _BATCHES_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
