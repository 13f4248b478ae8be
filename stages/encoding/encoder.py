"""Prepared rows → token rows: rendered, encoded, masked and cut, under the `tokenize` section of params.yaml."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from stages.encoding import cutting, offsets
from stages.encoding.masks import Masked, Masker, Tokens
from stages.encoding.rendering import Rendered, Renderer
from stages.params import schema
from stages.prepared.row import PreparedRow
from stages.templating.tokenizer import TextTokenizer
from stages.tokens.row import TokenRow

_BATCH_ROWS = 512  # rows the tokenizer encodes at a time, on all cores
_BATCHES_AHEAD = 2

Reason = Literal["bad", "too_long", "nothing_to_learn"]
REASONS: tuple[Reason, ...] = ("bad", "too_long", "nothing_to_learn")
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Encoded:
    """The outcome for one prepared row: token rows (several if it was split), or the reason why there are none."""

    source: str
    rows: tuple[TokenRow, ...] = ()
    length: int = 0  # tokens before anything was cut
    characters: int = 0
    reason: Reason | None = None
    message: str = ""
    counts: dict[str, int] = field(default_factory=dict)  # for the ledger


class Encoder:
    """Prepared rows → token rows."""

    def __init__(self, tokenizer: Any, options: schema.Tokenize) -> None:
        self._options = options
        self._tokenizer = TextTokenizer(tokenizer)
        self._renderer = Renderer(tokenizer, self._tokenizer, options)
        self._masker = Masker(self._tokenizer)

    @property
    def backend(self) -> Any:
        """The tokenizer that texts are encoded with."""
        return self._tokenizer.backend

    @property
    def template_hash(self) -> str:
        """Hex sha256 of the chat template that conversations so far were rendered with; "" if there were none."""
        return self._renderer.chat.used_hash

    def encode(self, rows: Iterable[PreparedRow]) -> Iterator[Encoded]:
        """The outcome for each row, in order. The next batches are encoded while the caller uses this one's."""
        for batch in _ahead(self._encode_batch, _batches(rows, _BATCH_ROWS)):
            masked = iter(self._masker.mask([tokens for tokens in batch if isinstance(tokens, Tokens)]))
            for result in batch:
                yield result if isinstance(result, Encoded) else self._result(next(masked))

    def _encode_batch(self, rows: Sequence[PreparedRow]) -> list[Tokens | Encoded]:
        """The tokens of each row, or the outcome for one that is refused."""
        made = [self._render(row) for row in rows]
        good = [(row, result) for row, result in zip(rows, made, strict=True) if isinstance(result, Rendered)]
        encoded = iter(self._masker.encode(good))
        results = [next(encoded) if isinstance(result, Rendered) else result for result in made]
        return [
            result if isinstance(result, Tokens) else _refused(row, result)
            for row, result in zip(rows, results, strict=True)
        ]

    def _render(self, row: PreparedRow) -> Rendered | ValueError:
        try:
            return self._renderer.render(row)
        except ValueError as error:
            return error

    def _result(self, masked: Masked) -> Encoded:
        """The outcome for a row whose length is known: used whole, cut, or dropped."""
        row, made, length = masked.tokens.row, masked.tokens.rendered, len(masked.ids)
        if not masked.trained:
            return _dropped(masked, "nothing_to_learn")
        if length <= self._options.max_length:
            size = sum(offsets.size(made.text[span.start : span.text_end]) for span in made.spans)
            size -= masked.first_bytes if made.spans[0].start == 0 else 0
            token_row = TokenRow(row.id, row.source, masked.ids, masked.mask, size, False, row.group, row.carried or {})
            counts = made.counts | {"trained_answers": len(made.answers)} if made.answers else made.counts
            return Encoded(row.source, (token_row,), length, len(made.text), counts=counts)
        if self._options.over_length in ("drop", "error"):
            message = (
                f"{row.source}: has {length} tokens; raise tokenize.max_length ({self._options.max_length}) "
                "or set tokenize.over_length: truncate"
            )
            return _dropped(masked, "too_long", message)
        cuts = list(self._cut(masked))
        if not cuts:
            return _dropped(masked, "nothing_to_learn")
        left = sum(any(start < cut.high and cut.low < end for cut in cuts) for start, end in made.answers)
        counts = made.counts | {"trained_answers": left, "answers_cut": len(made.answers) - left}
        return Encoded(row.source, tuple(cut.row for cut in cuts), length, len(made.text), counts=counts)

    def _cut(self, masked: Masked) -> Iterator[cutting.Cut]:
        encoding, max_length = self._masker.located(masked.tokens), self._options.max_length
        if self._options.over_length == "split" and masked.tokens.row.text is not None:
            return cutting.windows(masked, encoding, max_length, overlap=self._options.overlap)
        return cutting.truncate(masked, encoding, max_length, prefix=self._tokenizer.prefix)


def _dropped(masked: Masked, reason: Reason, message: str = "") -> Encoded:
    """A row that is not used; its answers count as dropped with it."""
    made = masked.tokens.rendered
    counts = made.counts | {"answers_dropped": len(made.answers)} if made.answers else made.counts
    return Encoded(masked.tokens.row.source, (), len(masked.ids), len(made.text), reason, message, counts)


def _refused(row: PreparedRow, problem: ValueError) -> Encoded:
    answers = sum(message.get("role") == "assistant" for message in row.messages or ())
    counts = {"assistant_turns": answers, "answers_dropped": answers} if answers else {}
    return Encoded(row.source, reason="bad", message=f"{row.source}: {problem}", counts=counts)


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
