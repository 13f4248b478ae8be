"""The general text that comes with the project is what data/README.md says."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter

from tests.support.imports import ROOT

ROWS = [json.loads(line) for line in (ROOT / "data" / "general.jsonl").read_text(encoding="utf-8").splitlines()]


def test_general_text_is_thirty_paragraphs_in_each_of_two_languages() -> None:
    assert {tuple(row) for row in ROWS} == {("language", "text")}
    assert Counter(row["language"] for row in ROWS) == {"en": 30, "ko": 30}


def test_general_text_is_in_the_language_that_it_names() -> None:
    for row in ROWS:
        letters = [letter for letter in row["text"] if letter.isalpha()]
        hangul = sum("가" <= letter <= "힣" for letter in letters) / len(letters)
        assert hangul == {"en": 0, "ko": 1}[row["language"]], row["text"]


def test_general_text_has_no_paragraph_twice_and_is_normalized() -> None:
    texts = [row["text"] for row in ROWS]
    assert len({text.casefold() for text in texts}) == len(texts)
    assert all(unicodedata.is_normalized("NFC", text) and text == text.strip() for text in texts)


def test_general_text_is_none_of_what_the_default_run_learns() -> None:
    learned = (ROOT / "data" / "raw" / "korean_qa.jsonl").read_text(encoding="utf-8")
    runs = {row["text"][i : i + 12] for row in ROWS for i in range(len(row["text"]) - 11)}
    assert {run for run in runs if run in learned} == set()
