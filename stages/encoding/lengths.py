"""Figures about encoded rows: how long they are, what `max_length` means for them, how well the vocabulary fits."""

from __future__ import annotations

import json
from array import array
from typing import Any

import numpy as np

from stages.encoding.encoder import REASONS, Encoded
from stages.encoding.offsets import byte_alphabet, is_byte_level
from stages.prepared.ledger import Ledger
from stages.prepared.splits import SPLITS
from stages.tokens.row import TokenRow

# Why an assistant's turn is not trained on: counter → words. The counters and `trained_answers` make up the turns.
UNTRAINED = {
    "answers_masked": "masked by train: false",
    "answers_before_last": "before the last, by train_on: last_assistant",
    "answers_cut": "cut away by max_length",
    "answers_dropped": "in dropped rows",
}
COUNTED = (
    "truncated", "split", "rows", "tokens", "trained_tokens", "characters", "fallback_tokens",
    "assistant_turns", "trained_answers", *UNTRAINED, "thoughts_left_out", "special_in_content",
)  # fmt: skip
_PERCENTILES = (50, 90, 95, 99)
_BINS = 40
_MANY = 512


class Tally:
    """Counts and lengths of the prepared rows of each split; `fallback` is the table of `fallback_ids`."""

    def __init__(self, fallback: np.ndarray) -> None:
        self._fallback = fallback
        self._ledger = Ledger(REASONS, COUNTED)
        self._pending: dict[str, list[TokenRow]] = {}
        self._lengths = {split: array("I") for split in SPLITS}  # before anything was cut

    def count(self, split: str, encoded: Encoded) -> None:
        """Take note of one prepared row."""
        if encoded.length:
            self._lengths[split].append(encoded.length)
        self._ledger.add(split, **encoded.counts)
        if encoded.reason is not None:
            self._ledger.dropped(split, encoded.reason)
            return
        rows = encoded.rows
        self._ledger.used(split, rows=len(rows), characters=encoded.characters)
        if rows[0].truncated or len(rows) > 1:
            self._ledger.add(split, truncated=int(rows[0].truncated), split=int(len(rows) > 1))
        self._pending.setdefault(split, []).extend(rows)
        if len(self._pending[split]) >= _MANY:
            self._count_tokens(split)

    def _count_tokens(self, split: str) -> None:
        # Of many rows at once: NumPy's calls cost more than a row's tokens.
        if rows := self._pending.pop(split, []):
            ids = np.concatenate([row.input_ids for row in rows])
            mask = np.concatenate([row.loss_mask for row in rows])
            self._ledger.add(
                split,
                tokens=len(ids),
                trained_tokens=int(np.count_nonzero(mask)),
                fallback_tokens=int(np.count_nonzero(self._fallback[ids])),
            )

    def figures(self, split: str) -> dict[str, Any]:
        """All numbers of a split, finite whatever it holds."""
        for name in SPLITS:
            self._count_tokens(name)
        figures: dict[str, Any] = dict(self._ledger.figures(split))
        tokens = figures["tokens"]
        lengths = self.lengths(split)
        uncut = int(lengths.sum())
        figures["characters_per_token"] = round(figures["characters"] / uncut, 4) if uncut else 0.0
        figures["fallback_share"] = round(figures.pop("fallback_tokens") / tokens, 4) if tokens else 0.0
        for percentile in _PERCENTILES:
            figures[f"length_p{percentile}"] = _percentile(lengths, percentile)
        figures["longest"] = int(lengths.max(initial=0))
        return figures

    def lengths(self, split: str) -> np.ndarray:
        """Lengths of the rows in tokens, before anything was cut; of one split, or of `all`."""
        parts = self._lengths.values() if split == "all" else [self._lengths[split]]
        return np.concatenate([np.frombuffer(part, dtype=np.uint32) for part in parts])

    def histogram(self) -> list[tuple[int, str, int]]:
        """(longest length of the bin, split, rows) for bins of equal width over all lengths."""
        longest = int(self.lengths("all").max(initial=1))
        width = -(-longest // _BINS)
        edges = np.arange(1, longest + width + 1, width)
        return [
            (int(edge - 1), split, int(count))
            for split in SPLITS
            for edge, count in zip(edges[1:], np.histogram(self.lengths(split), edges)[0], strict=True)
        ]

    def answers(self) -> str | None:
        """One sentence on the assistants' turns that are not trained on, with the reasons; None if all are."""
        figures = self._ledger.figures("all")
        reasons = [f"{figures[name]:,} {words}" for name, words in UNTRAINED.items() if figures[name]]
        if not reasons:
            return None
        read, trained = figures["assistant_turns"], figures["trained_answers"]
        return f"{trained:,} of {read:,} assistant turns are trained on: {'; '.join(reasons)}"

    def advice(self, max_length: int) -> list[str]:
        """Sentences on `max_length`: how many rows are longer, and the value that would hold them all."""
        lengths = self.lengths("all")
        if not len(lengths):
            return []
        longer, longest = int((lengths > max_length).sum()), int(lengths.max())
        first = f"max_length {max_length}: {longer:,} of {len(lengths):,} rows are longer ({longer / len(lengths):.1%})"
        if longer:
            lost = int((lengths[lengths > max_length] - max_length).sum())
            first += f", by {lost:,} tokens together; {_up(longest)} would hold them all"
        elif _up(longest) < max_length:
            first += f"; {_up(longest)} would do as well, the longest row has {longest:,}"
        most = _up(_percentile(lengths, 95))
        return [first, f"95% of the rows fit into {most}; memory in training grows with the longest row of a batch"]


def fallback_ids(backend: Any) -> np.ndarray:
    """A table over token ids: True for those that stand for less than a character, or for an unknown one.

    These are the unknown token, byte tokens such as <0xEA>, and tokens of a byte-level vocabulary that hold parts of
    characters: text that needs many of them is text that the tokenizer was not made for.
    """
    state = json.loads(backend.to_str())
    vocabulary = backend.get_vocab(with_added_tokens=False)
    table = np.zeros(max(backend.get_vocab(with_added_tokens=True).values()) + 1, dtype=bool)
    unknown = state["model"].get("unk_token")
    if unknown in vocabulary:
        table[vocabulary[unknown]] = True
    of_bytes = is_byte_level(backend)
    byte_of = byte_alphabet() if of_bytes else {}
    for token, index in vocabulary.items():
        if of_bytes:
            table[index] |= not _is_text(bytes(byte_of[symbol] for symbol in token if symbol in byte_of))
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            table[index] = True
    return table


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _percentile(lengths: np.ndarray, percentile: int) -> int:
    return int(np.percentile(lengths, percentile, method="inverted_cdf")) if len(lengths) else 0


def _up(length: int) -> int:
    """The next multiple of 32, at least 32."""
    return max(-(-length // 32) * 32, 32)
