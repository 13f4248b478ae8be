"""Preference pairs and labels are refused by name, or used as the parameters say."""

from __future__ import annotations

from typing import Any

import pytest

from stages.schemas.preferences import UnwantedError
from stages.schemas.schemas import Schemas

ASKED, ANSWERED = {"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}
WORSE = {"role": "assistant", "content": "bad"}
EARLIER = {"role": "assistant", "content": "earlier"}
CONTEXT = {**EARLIER, "train": False}
TOOL = {"type": "function", "function": {"name": "turn"}}
PAIRS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # a row, and its content without a template
    ({"prompt": "q", "chosen": "good", "rejected": "bad"}, {"messages": [ASKED, ANSWERED]}),
    ({"question": "q", "chosen": "good", "rejected": "bad"}, {"messages": [ASKED, ANSWERED]}),
    ({"question": "q", "chosen": [ANSWERED], "rejected": [WORSE]}, {"messages": [ASKED, ANSWERED]}),
    (
        {"instruction": "q", "input": "i", "chosen": "good", "rejected": "bad"},
        {"messages": [{"role": "user", "content": "q\n\ni"}, ANSWERED]},
    ),
    ({"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [WORSE]}, {"messages": [ASKED, ANSWERED]}),
    ({"prompt": "q", "chosen": [ANSWERED], "rejected": [WORSE]}, {"messages": [ASKED, ANSWERED]}),
    ({"chosen": [ASKED, ANSWERED], "rejected": [ASKED, WORSE]}, {"messages": [ASKED, ANSWERED]}),
    (
        {"prompt": "q", "messages": [ASKED, WORSE], "chosen": [ASKED, ANSWERED], "rejected": [ASKED, WORSE]},
        {"messages": [ASKED, ANSWERED]},
    ),
    ({"chosen_messages": [ASKED, ANSWERED], "rejected_messages": [ASKED, WORSE]}, {"messages": [ASKED, ANSWERED]}),
    (
        {"messages": [ASKED, EARLIER, ASKED], "chosen": ANSWERED, "rejected": WORSE, "tools": [TOOL]},
        {"messages": [ASKED, CONTEXT, ASKED, ANSWERED], "tools": [TOOL]},
    ),
    (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {},
        },
        {"messages": [ASKED, ANSWERED]},
    ),
    ({"messages": [ASKED], "chosen": "good", "rejected": "bad"}, {"messages": [ASKED, ANSWERED]}),
    (
        {
            "input": {"messages": [ASKED], "tools": [TOOL], "parallel_tool_calls": True},
            "preferred_output": [ANSWERED],
            "non_preferred_output": [WORSE],
        },
        {"messages": [ASKED, ANSWERED], "tools": [TOOL]},
    ),
    ({"chosen": "Human: q Assistant: good", "rejected": "x"}, {"text": "Human: q Assistant: good"}),
]


def read(row: dict[str, Any], template: str | None = None, **options: Any) -> dict[str, Any]:
    schemas = Schemas(template, **options)
    fields = schemas.row(row)
    return schemas.read(fields, schemas.detect(fields)).content


@pytest.mark.parametrize(("row", "content"), PAIRS)
def test_a_pair_is_refused_or_its_chosen_answer_used(row: dict[str, Any], content: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is a preference pair \(.*\); set prepare.preferences: chosen to train on"):
        read(row)
    assert read(row, preferences="chosen") == content


def test_a_chosen_answer_goes_into_the_template() -> None:
    row = {"question": "q", "chosen": "good", "rejected": "bad"}
    assert read(row, "{question}|{answer}", preferences="chosen") == {"prompt": "q|", "completion": "good"}


def test_a_pair_that_the_parameters_part_is_no_pair() -> None:
    row = {"question": "q", "chosen": "good", "rejected": "bad"}
    assert read(row, "{question}|{chosen}") == {"prompt": "q|", "completion": "good"}
    assert read(row, columns={"answer": "chosen"}) == {"messages": [ASKED, ANSWERED]}


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"prompt": "q", "rejected": "bad"}, "has rejected, but no chosen answer; correct the row"),
        ({"question": "q", "chosen": [ANSWERED, ASKED]}, "'chosen' must be one answer of text beside a question"),
    ],
)
def test_a_pair_without_an_answer_to_choose_is_refused(row: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        read(row, preferences="chosen")


def test_columns_of_these_names_that_hold_no_answers_make_no_pair() -> None:
    row = {"prompt": "q", "completion": "good", "rejected": False, "chosen": None}
    assert read(row) == {"messages": [ASKED, ANSWERED]}


@pytest.mark.parametrize("name", ["label", "kto_tag"])
@pytest.mark.parametrize("true", [True, "True", "true"])
@pytest.mark.parametrize("rest", [{"prompt": "q", "completion": "good"}, {"messages": [ASKED, ANSWERED]}])
def test_a_label_is_refused_or_its_false_rows_dropped(name: str, true: Any, rest: dict[str, Any]) -> None:
    false = "False" if isinstance(true, str) else False
    for label in (true, false):
        with pytest.raises(ValueError, match=f"'{name}' says whether the answer is wanted; set prepare.labels"):
            read(rest | {name: label})
        assert read(rest | {name: label}, labels="ignore") == {"messages": [ASKED, ANSWERED]}
    assert read(rest | {name: true}, labels="drop_false") == {"messages": [ASKED, ANSWERED]}
    with pytest.raises(UnwantedError):
        read(rest | {name: false}, labels="drop_false")


@pytest.mark.parametrize("label", [0, 1, "spam", None, "1"])
def test_labels_of_another_kind_are_no_labels_of_answers(label: Any) -> None:
    assert read({"prompt": "q", "completion": "good", "label": label}) == {"messages": [ASKED, ANSWERED]}


@pytest.mark.parametrize(("true", "false"), [(1, 0), ("1", "0")])
def test_numbers_are_labels_of_answers_where_labels_are_read(true: Any, false: Any) -> None:
    row = {"prompt": "q", "completion": "good"}
    assert read(row | {"label": true}, labels="drop_false") == {"messages": [ASKED, ANSWERED]}
    with pytest.raises(UnwantedError):
        read(row | {"label": false}, labels="drop_false")


@pytest.mark.parametrize(("label", "unread"), [(1, ()), (True, ()), (2, ("label",)), ("spam", ("label",))])
def test_a_label_of_another_kind_is_named_as_not_read(label: Any, unread: tuple[str, ...]) -> None:
    schemas = Schemas(None, labels="drop_false")
    row = {"prompt": "q", "completion": "good", "label": label}
    assert schemas.read(row, schemas.detect(row)).unread == unread


@pytest.mark.parametrize("column", ["messages", "conversations", "prompt"])
@pytest.mark.parametrize("chosen", ["good", ANSWERED, [ANSWERED]])
def test_a_chosen_answer_after_another_answer_is_refused(column: str, chosen: Any) -> None:
    row = {column: [ASKED, EARLIER], "chosen": chosen, "rejected": WORSE}
    with pytest.raises(ValueError, match=f"its '{column}' ends with an answer, before the one in 'chosen'; remove"):
        read(row, preferences="chosen")


@pytest.mark.parametrize("column", ["prompt", "messages", "conversations"])
def test_a_system_turn_that_the_chosen_conversation_lacks_is_refused(column: str) -> None:
    system = {"role": "system", "content": "Be short."}
    row = {column: [system, ASKED], "chosen": [ASKED, ANSWERED], "rejected": [ASKED, WORSE]}
    with pytest.raises(ValueError, match=f"its '{column}' has a system turn that 'chosen' lacks; put it there"):
        read(row, preferences="chosen")
    whole = row | {"chosen": [system, ASKED, ANSWERED]}
    assert read(whole, preferences="chosen") == {"messages": [system, ASKED, ANSWERED]}
