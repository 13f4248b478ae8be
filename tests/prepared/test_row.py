"""A row's name follows from its content alone."""

from __future__ import annotations

from itertools import pairwise

from stages.prepared.row import row_id, text_id


def test_the_id_of_a_text_or_of_a_last_line_to_complete_is_the_text_s() -> None:
    assert row_id("Q: a\nA: b", None) == text_id("Q: a\nA: b") == "a85016b038940a5d"
    assert row_id("Q: a\nb", "Q: a\n") == text_id("Q: a\nb")


def test_rows_that_only_join_to_the_same_text_have_ids_of_their_own() -> None:
    text = "one\ntwo\nthree"
    ids = [row_id(text, text[:length]) for length in range(1, len(text))]
    assert len(set(ids)) == len(ids)
    assert all(a != b for a, b in pairwise(ids))
