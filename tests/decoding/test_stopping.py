"""An answer's text while it grows."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.decoding.stopping import AnswerText

TEXTS = st.text(alphabet="ab#\n \N{REPLACEMENT CHARACTER}", max_size=24)


def shown(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    text = AnswerText(stops)
    said = [text.feed(piece) for piece in pieces]
    return [*said, text.end()], text.stopped


@given(TEXTS, st.text(alphabet="ab#\n", min_size=1, max_size=4), st.lists(st.integers(0, 24), max_size=6))
def test_however_it_is_cut_into_pieces_the_text_is_the_same(text: str, stop: str, cuts: list[int]) -> None:
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    said, stopped = shown([text[a:b] for a, b in pairwise(borders)], [stop])
    assert stopped == (stop in text)
    assert "".join(said) == text.partition(stop)[0].rstrip("\N{REPLACEMENT CHARACTER}").strip()


def test_nothing_is_held_back_longer_than_it_must_be() -> None:
    said, _ = shown(["a#", "#", "b#", "#", "#", "c"], ["###"])
    assert said == ["a", "", "##b", "", "", "", ""]


def test_what_began_like_a_stop_string_is_shown_when_nothing_follows() -> None:
    assert shown(["a##"], ["###"]) == (["a", "##"], False)


@pytest.mark.parametrize("order", [["ab", "abc"], ["abc", "ab"]])
def test_the_first_of_several_stop_strings_counts(order: list[str]) -> None:
    assert shown(["x", "a", "b", "c", "y"], order) == (["x", "", "", "", "", ""], True)


def test_white_space_goes_with_what_follows_it() -> None:
    assert shown([" ", "a", " \n", "b", "\n"], []) == (["", "a", "", " \nb", "", ""], False)
