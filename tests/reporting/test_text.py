"""Text of the user's own: what shows nothing is written out, and the script chooses the language."""

from __future__ import annotations

import pytest

from stages.reporting.text import is_code, language, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("한글\n\tab", "한글\n\tab"),
        ("a\r\nb\rc", "a\nb[U+000D]c"),
        ("\x00\x1b[31m\x7f\x85", "[U+0000][U+001B][31m[U+007F][U+0085]"),
        ("\u202eabc\u2066", "[U+202E]abc[U+2066]"),
        ("a\ud800b", "a\N{REPLACEMENT CHARACTER}b"),
        ("👩\u200d🔬 السلام\u200f", "👩\u200d🔬 السلام\u200f"),
    ],
)
def test_what_shows_nothing_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown
    shown.encode()


@pytest.mark.parametrize(
    ("text", "tag"), [("수 is 數", "ko"), ("漢字のかな", "ja"), ("漢字", "zh"), ("Straße", ""), ("", "")]
)
def test_the_script_chooses_the_language(text: str, tag: str) -> None:
    assert language(text) == tag


@pytest.mark.parametrize("text", ["```\nx\n```", "if a:\n    b", "{\n  1\n}", "a:\n\tb"])
def test_indented_lines_and_fences_are_code(text: str) -> None:
    assert is_code(text)


def test_prose_is_no_code() -> None:
    assert not is_code("첫째 줄\n둘째 줄\n\n### 답변:\n a")
