"""Rendered rows → token ids and loss masks, many rows at once.

The mask comes from characters: each token of the whole text that overlaps what is to be learned is trained on, one that
spans the border between prompt and answer too. No prompt is ever tokenized apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from stages.encoding import offsets
from stages.encoding.rendering import Rendered
from stages.prepared.row import PreparedRow
from stages.templating.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class Tokens:
    """A row's token ids, EOS at their end if it belongs there.

    `ends`: with a trained EOS; `appended`: which the text itself does not end with.
    """

    row: PreparedRow
    rendered: Rendered
    encoding: Any
    ids: list[int]
    ends: bool
    appended: bool


@dataclass(frozen=True, slots=True)
class Masked:
    """A row's tokens as arrays. `first_bytes` is the length of the first token, which is never trained on."""

    tokens: Tokens
    ids: np.ndarray  # int32, (L,)
    mask: np.ndarray  # bool, (L,)
    trained: int
    first_bytes: int


@dataclass(frozen=True, slots=True)
class _Positions:
    """Bytes of a batch: each token's end and length, each row's start (`before`); `fits`: its lengths add up."""

    ends: np.ndarray
    lengths: np.ndarray
    before: list[int]
    fits: list[bool]


_EDGES = (offsets.first_token, offsets.end_token)


class Masker:
    """Encodes texts and says which of their tokens are trained."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self.byte_lengths = offsets.byte_lengths(tokenizer.backend)

    def encode(self, rows: Sequence[tuple[PreparedRow, Rendered]]) -> list[Tokens | ValueError]:
        """The rows' tokens, in order; an error in place of a row whose control tokens cannot be written as text."""
        encodings: list[Any] = [None] * len(rows)
        backend = self._tokenizer.backend
        encode_batch = backend.encode_batch if self.byte_lengths is None else backend.encode_batch_fast
        for special in (True, False):
            chosen = [i for i, (_, made) in enumerate(rows) if made.special is special and made.coded is None]
            if chosen:
                texts = [rows[i][1].text for i in chosen]
                for i, encoding in zip(chosen, encode_batch(texts, add_special_tokens=special), strict=True):
                    encodings[i] = encoding
        return [
            self._tokens(row, made, encoding) if made.coded is None else self._coded(row, made)
            for (row, made), encoding in zip(rows, encodings, strict=True)
        ]

    def located(self, tokens: Tokens) -> Any:
        """The row's encoding with offsets."""
        made = tokens.rendered
        if self.byte_lengths is None or made.coded is not None:
            return tokens.encoding
        return self._tokenizer.backend.encode(made.text, add_special_tokens=made.special)

    def mask(self, batch: Sequence[Tokens]) -> list[Masked]:
        """Ids and masks of a batch, in one array each: per-row arrays would cost as much as the encoding."""
        if not batch:
            return []
        ids = np.fromiter(chain.from_iterable(tokens.ids for tokens in batch), dtype=np.int32)
        borders = np.concatenate([[0], np.cumsum([len(tokens.ids) for tokens in batch])])
        begins = borders.tolist()
        mask, first_bytes = self._mask(batch, ids, begins)
        mask[borders[:-1][np.diff(borders) > 0]] = False
        trained = np.diff(np.concatenate([[0], np.cumsum(mask)])[borders]).tolist()
        return [
            Masked(tokens, ids[begin:end], mask[begin:end], count, size)
            for tokens, begin, end, count, size in zip(batch, begins, begins[1:], trained, first_bytes, strict=False)
        ]

    def _coded(self, row: PreparedRow, made: Rendered) -> Tokens | ValueError:
        try:
            encoding = self._tokenizer.encode(made.coded or "", hidden=True, add_special_tokens=made.special)
        except ValueError as error:
            return error
        return self._tokens(row, made, encoding)

    def _tokens(self, row: PreparedRow, made: Rendered, encoding: Any) -> Tokens:
        ids: list[int] = encoding.ids
        if made.special and self._tokenizer.suffix:
            del ids[-self._tokenizer.suffix :]  # whether there is an EOS is add_eos's to say
        ends = bool(made.eos and made.spans)
        appended = ends and not (ids and ids[-1] == self._tokenizer.eos)
        return Tokens(row, made, encoding, [*ids, self._tokenizer.eos] if appended else ids, ends, appended)

    def _mask(self, batch: Sequence[Tokens], ids: np.ndarray, begins: list[int]) -> tuple[np.ndarray, list[int]]:
        """The tokens that overlap a span, and each EOS at the end of one; the bytes of each row's first token."""
        mask = np.zeros(len(ids), dtype=bool)
        located = self._positions(batch, ids, begins)
        starts: list[int] = []
        stops: list[int] = []
        first_bytes = []
        for i, (tokens, begin, end) in enumerate(zip(batch, begins, begins[1:], strict=False)):
            spans, text = tokens.rendered.spans, tokens.rendered.text
            if not spans:
                first_bytes.append(0)
            elif located and located.fits[i]:
                first_bytes.append(int(located.lengths[begin]))
                for span in spans:
                    starts.append(located.before[i] + offsets.size(text, span.start))
                    stops.append(located.before[i] + offsets.size(text, span.end))
            else:
                encoding = self.located(tokens)
                first_bytes.append(offsets.size(text, offsets.place(encoding, 0, 1, 0)))
                for span in spans:
                    first, last = (f(encoding, c, text) for f, c in zip(_EDGES, (span.start, span.end), strict=True))
                    mask[begin + first : min(begin + last, end)] = True
            if tokens.ends:
                mask[end - 1] = True
        if located:
            firsts = np.searchsorted(located.ends, starts, side="right").tolist()
            lasts = np.searchsorted(located.ends, stops, side="left").tolist()
            for first, last in zip(firsts, lasts, strict=True):
                mask[first : last + 1] = True
        return mask, first_bytes

    def _positions(self, batch: Sequence[Tokens], ids: np.ndarray, begins: list[int]) -> _Positions | None:
        """The places of a batch's tokens in bytes; None if the tokenizer's byte lengths are not known."""
        if self.byte_lengths is None:
            return None
        lengths = self.byte_lengths[ids]
        for tokens, begin, end in zip(batch, begins, begins[1:], strict=False):
            # What was added to the text stands for none of its bytes.
            if tokens.appended:
                lengths[end - 1] = 0
            if tokens.rendered.special:
                lengths[begin : begin + self._tokenizer.prefix] = 0
        ends = np.cumsum(lengths)
        before = np.concatenate([[0], ends])[begins].tolist()
        fits = [
            stop - start == offsets.size(tokens.rendered.text)
            for tokens, start, stop in zip(batch, before, before[1:], strict=False)
        ]
        return _Positions(ends, lengths, before, fits)
