"""Questions are the test rows' own beginnings; general text is scored whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stages.questions.general import general_rows
from stages.questions.rows import questions_of
from stages.readers.rows import RawRow
from stages.tokens.row import TokenRow
from tests.support.tokenizers import tokenizer


def row(text: str, answers: list[str], name: str = "a") -> TokenRow:
    """A row of this text in which these parts are learned."""
    encoded = tokenizer().backend_tokenizer.encode(text, add_special_tokens=False)
    spans = [(text.index(answer), text.index(answer) + len(answer)) for answer in answers]
    mask = [any(low < end and high > start for start, end in spans) for low, high in encoded.offsets]
    return TokenRow(name, f"{name}:1", np.array(encoded.ids, np.int32), np.array(mask), 0, False)


def test_a_question_ends_where_the_answer_begins() -> None:
    [question], without = questions_of([row("Q: why? A: so.", ["so."])], tokenizer(), limit=9)
    assert (question.prompt, question.reference, without) == ("Q: why? A: ", "so.", 0)


def test_of_a_conversation_the_last_answer_is_asked_for() -> None:
    [question], _ = questions_of([row("one two three four", ["two", "four"])], tokenizer(), limit=9)
    assert (question.prompt, question.reference) == ("one two three ", "four")


def test_a_row_of_which_nothing_is_only_read_has_no_question() -> None:
    assert questions_of([row("all of it", ["all of it"])], tokenizer(), limit=9) == ([], 1)


def test_the_limit_chooses_by_content_and_keeps_the_order() -> None:
    rows = [row("Q: why? A: so.", ["so."], name) for name in "bca"]
    chosen, _ = questions_of(rows, tokenizer(), limit=2)
    assert [question.id for question in chosen] == ["b", "a"]


def test_general_text_is_scored_whole() -> None:
    raw = [RawRow("g:1", {"text": "it rains", "language": "en"})]
    [(language, made)] = list(general_rows(raw, tokenizer(), max_length=99))
    assert language == "en" and made.loss_mask.sum() == len(made.input_ids) - 1


@pytest.mark.parametrize("fields", [{}, {"text": 3}, {"text": "x", "language": 3}])
def test_general_text_of_another_kind_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^g:1: general text needs"):
        list(general_rows([RawRow("g:1", fields)], tokenizer(), max_length=99))
