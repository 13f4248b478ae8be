"""The places of the answers in a plain text, by markers."""

from __future__ import annotations

import pytest

from stages.encoding.markers import answers

Q, A = "### Q:\n", "### A:\n"


def found(text: str, answer: str = A, question: str | None = None) -> list[str]:
    return [text[start:end] for start, end in answers(text, answer, question)]


def test_each_answer_ends_where_the_next_question_begins() -> None:
    text = f"{Q}2+2?\n{A}four\n{Q}3+3?\n{A}six"
    assert found(text, A, Q) == ["four\n", "six"]
    assert found(f"{text}\n{Q}5+5?", A, Q) == ["four\n", "six\n"]
    assert found(text, "\n" + A, "\n" + Q) == ["four", "six"]


def test_several_answers_need_a_question_marker() -> None:
    text = f"{Q}2+2?\n{A}four\n{Q}3+3?\n{A}six"
    with pytest.raises(ValueError, match=r"has 2 answers by tokenize.answer_marker .* in tokenize.question_marker"):
        found(text)
    with pytest.raises(ValueError, match="twice without '#Q' between them"):
        found(text, A, "#Q")


def test_a_marker_within_a_line_is_no_answer_where_one_stands_at_a_line_s_start() -> None:
    assert found(f"{Q}What does '{A}' mean?\n{A}It begins an answer.") == ["It begins an answer."]
    assert found(f"{Q}How?\n{A}Write '{Q}' first.", A, Q) == [f"Write '{Q}' first."]


def test_a_marker_may_stand_within_lines() -> None:
    assert found("[INST] one? [/INST] ONE [INST] two? [/INST] TWO", "[/INST]", "[INST]") == [" ONE ", " TWO"]


def test_a_text_without_the_marker_has_no_answer() -> None:
    assert found("nothing") == []
