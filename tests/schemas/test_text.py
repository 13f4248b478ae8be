"""Text that shows nothing is no text."""

from __future__ import annotations

from typing import Any

import pytest

from stages.schemas.text import holds, is_blank


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b", "\ufeff", "\u00ad\u2060 \u200d", "\u3164", "\x00", "\ufe0f"])
def test_zero_width_characters_alone_are_no_text(text: str) -> None:
    assert is_blank(text)


@pytest.mark.parametrize("text", ["a", "\u200b.", "\ufeff한", "0", "👩‍👩‍👧"])
def test_one_visible_character_is_text(text: str) -> None:
    assert not is_blank(text)


@pytest.mark.parametrize("value", [None, "", "\u200b", "[]", " {} ", [], {}])
def test_what_holds_nothing(value: Any) -> None:
    assert not holds(value)


@pytest.mark.parametrize("value", ["[1]", "x", [None], {"a": None}, 0, False])
def test_what_holds_something(value: Any) -> None:
    assert holds(value)
