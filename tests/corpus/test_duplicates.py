"""Rows that are the same row, and rows that only look it."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from stages.corpus.duplicates import Seen, Verdict
from stages.schemas.content import content_text

Mode = Literal["keep", "exact", "normalized"]


def judged(mode: Mode, *rows: tuple[dict[str, Any], str]) -> list[Verdict]:
    seen = Seen(mode)
    return [seen.judge(content, content_text(content), split) for content, split in rows]


def pair(prompt: str, completion: str, split: str = "train") -> tuple[dict[str, Any], str]:
    return {"prompt": prompt, "completion": completion}, split


def text(value: str, split: str = "train") -> tuple[dict[str, Any], str]:
    return {"text": value}, split


@pytest.mark.parametrize("mode", ["exact", "normalized"])
def test_rows_that_only_join_to_the_same_text_are_two(mode: Mode) -> None:
    found = judged(mode, pair("ab", "c"), pair("a", "bc"), pair("a", "bc"), pair("ab", "c"))
    assert found == ["new", "new", "duplicate", "duplicate"]


def test_white_space_between_the_sides_makes_no_other_row() -> None:
    assert judged("normalized", pair("Q: ", "a"), pair("Q:", " a"), pair("q:\n", "A")) == [
        "new",
        "duplicate",
        "normalized_duplicate",
    ]
    assert judged("normalized", pair("Q:", "a"), pair("Q:", " a")) == ["new", "new"]


@pytest.mark.parametrize("mode", ["keep", "exact", "normalized"])
def test_a_text_is_the_same_row_as_the_pair_that_joins_to_it(mode: Mode) -> None:
    assert judged(mode, pair("Q: q\nA: ", "one\ntwo", "test"), text("Q: q\nA: one\ntwo")) == ["new", "leaked"]
    assert judged(mode, text("Q: q\nA: one\ntwo", "test"), pair("Q: q\nA: ", "one\ntwo")) == ["new", "leaked"]
