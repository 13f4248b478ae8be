"""Duplicates and near-duplicates among rows, and control characters in them.

Source: Unicode Standard Annex #15 (normalisation forms).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import Any, Literal

from stages.prepared.splits import SPLITS
from stages.schemas.content import Content

Verdict = Literal["new", "duplicate", "normalized_duplicate", "leaked"]

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_PROMPT = 2**32 - 1
_SHINGLE, _PERMUTATIONS, _BANDS = 5, 128, 32


def has_control(content: Content) -> bool:
    """True if a row holds control characters other than tab and line ends."""
    values = [turn["content"] for turn in content["messages"]] if "messages" in content else content.values()
    return any(_CONTROL.search(value) for value in values)


def plain(text: str) -> str:
    """The text without what two spellings of the same thing differ in: width, case, white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class Seen:
    """The rows so far, each in about 120 bytes: a digest of its text, plain or as it is → what tells it from others.

    That is 64 bits of its exact text, 32 of its prompt's length (0: it has none), and 2 of its split.
    """

    def __init__(self, mode: Literal["keep", "exact", "normalized"]) -> None:
        self._mode = mode
        self._rows: dict[int, int] = {}

    def judge(self, content: Content, text: str, split: str) -> Verdict:
        """Compare a row, meant for this split, with the rows before it, and say if it is new. A new one is remembered.

        A row is leaked if another split has it already: held-out splits must be shown first.
        """
        prompt, key = self._sides(content, text)
        row = (_digest(text) << 32 | prompt) << 2 | SPLITS.index(split)
        before = self._rows.setdefault(key, row)
        if before is not row and prompt and before >> 2 & _PROMPT not in (0, prompt):
            # The same text, parted elsewhere: another row.
            before = self._rows.setdefault(_digest(f"{key} {prompt}"), row)
        if before is row:
            return "new"
        if before & 3 != row & 3:
            return "leaked"
        if self._mode == "keep":
            return "new"
        return "duplicate" if before >> 34 == row >> 34 else "normalized_duplicate"

    def _sides(self, content: Content, text: str) -> tuple[int, int]:
        """The length of a row's prompt and the digest of its text, in the form in which rows are compared."""
        if "prompt" not in content:
            return 0, _digest(text if self._mode == "exact" else plain(text))
        prompt, completion = content["prompt"], content["completion"]
        if self._mode != "exact":
            # Plain text of the whole, put together from its sides, of which one is needed by itself.
            gap = " " if prompt[-1:].isspace() or completion[:1].isspace() else ""
            prompt, completion = plain(prompt), plain(completion)
            text = prompt + gap + completion
        return len(prompt) & _PROMPT, _digest(text)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class NearDuplicates:
    """Rows that resemble an earlier one: MinHash over runs of five characters, by the optional `rensa` library.

    Raises:
        ValueError: the library is not installed.
    """

    def __init__(self, threshold: float) -> None:
        try:
            from rensa import RMinHash, RMinHashLSH
        except ImportError:
            hint = "install it with: pip install 'rensa>=0.5'"
            raise ValueError(f"prepare.near_duplicates needs the rensa library; {hint}") from None
        self._threshold = threshold
        self._hash: Any = lambda: RMinHash(num_perm=_PERMUTATIONS, seed=0)
        self._index = RMinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, num_bands=_BANDS)
        self._rows: list[tuple[str, Any]] = []

    def earlier(self, text: str, place: str) -> str | None:
        """The place of an earlier row that resembles this one by the threshold or more. Remembers the row."""
        text = plain(text)
        signature = self._hash()
        signature.update(sorted({text[i : i + _SHINGLE] for i in range(max(len(text) - _SHINGLE + 1, 1))}))
        candidates = sorted(self._index.query(signature))
        alike = next((i for i in candidates if self._rows[i][1].jaccard(signature) >= self._threshold), None)
        self._index.insert(len(self._rows), signature)
        self._rows.append((place, signature))
        return None if alike is None else self._rows[alike][0]
