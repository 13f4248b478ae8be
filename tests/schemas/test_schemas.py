"""A row's columns become conversations with all that stands beside them, or a line that says why not."""

from __future__ import annotations

from typing import Any

import pytest

from stages.schemas.content import Reading
from stages.schemas.schemas import Schemas
from stages.schemas.text import EmptyError

TEMPLATE = "Q: {question}\nA: {answer}"
SYSTEM = {"role": "system", "content": "Be short."}
ASKED, ANSWERED = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
PARAMETERS = {"type": "object", "properties": {"to": {"enum": ["left", None]}}}
TOOL = {"type": "function", "function": {"name": "turn", "parameters": PARAMETERS}}
TOOL_TEXT = '{"type": "object", "properties": {"to": {"enum": ["left", null]}}}'
PAIRS: list[dict[str, Any]] = [
    {"question": "q", "answer": "a"},
    {"instruction": "q", "output": "a"},
    {"prompt": "q", "completion": "a"},
]


def reading(row: dict[str, Any], template: str | None = None) -> Reading:
    schemas = Schemas(template)
    fields = schemas.row(row)
    return schemas.read(fields, schemas.detect(fields))


def read(row: dict[str, Any], template: str | None = None) -> dict[str, Any]:
    return reading(row, template).content


@pytest.mark.parametrize("pair", PAIRS)
def test_system_history_and_tools_of_a_pair_become_turns(pair: dict[str, Any]) -> None:
    beside = {"system": "Be short.", "history": [["q1", "a1"], ["q2", "a2"]], "tools": [TOOL]}
    rounds = [
        {"role": role, "content": f"{role[0].replace('u', 'q')}{i}"} for i in (1, 2) for role in ("user", "assistant")
    ]
    assert read(pair | beside) == {"messages": [SYSTEM, *rounds, ASKED, ANSWERED], "tools": [TOOL]}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("beside", [{"system": "s"}, {"history": [["q", "a"]]}, {"tools": [TOOL]}])
def test_a_template_that_cannot_hold_them_is_refused(pair: dict[str, Any], beside: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"has {next(iter(beside))}, which prepare.template leaves out; set .*null"):
        read(pair | beside, TEMPLATE)


def test_a_template_that_names_the_column_holds_it() -> None:
    row = {"question": "q", "answer": "a", "system": "s"}
    assert read(row, "{system}|{question}|{answer}") == {"prompt": "s|q|", "completion": "a"}


@pytest.mark.parametrize("template", [TEMPLATE, None])
@pytest.mark.parametrize("nothing", [None, "", [], "[]"])
def test_empty_columns_beside_a_pair_say_nothing(template: str | None, nothing: Any) -> None:
    row = {"instruction": "q", "input": "", "output": "a"}
    assert read(row | {"system": "", "history": nothing, "tools": nothing}, template) == read(row, template)


@pytest.mark.parametrize("history", [[["q"]], ["q", "a"], [["q", "a", "b"]], [["q", None]], "earlier", {"q": "a"}])
def test_a_history_of_another_form_is_refused(history: Any) -> None:
    with pytest.raises(ValueError, match=r"'history'.* must be a list"):
        read({"instruction": "q", "output": "a", "history": history})


def test_an_empty_round_of_the_history_leaves_the_row_empty() -> None:
    with pytest.raises(EmptyError):
        read({"instruction": "q", "output": "a", "history": [["q", ""]]})


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_system_and_tools_columns_beside_turns(column: str) -> None:
    row = {
        column: [ASKED, ANSWERED],
        "system": "Be short.",
        "tools": f'[{{"name": "turn", "parameters": {TOOL_TEXT}}}]',
    }
    assert read(row, TEMPLATE) == {"messages": [SYSTEM, ASKED, ANSWERED], "tools": [TOOL]}
    assert read(row | {column: [SYSTEM, ASKED, ANSWERED]})["messages"] == [SYSTEM, ASKED, ANSWERED]
    assert read(row | {column: [{"role": "system", "content": ""}, ASKED, ANSWERED]})["messages"][0] == SYSTEM
    with pytest.raises(ValueError, match="'system' and the system turn say different things; keep one"):
        read(row | {column: [{"role": "system", "content": "Be long."}, ASKED, ANSWERED]})


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        [{"type": "function", "function": {"name": "turn", "parameters": TOOL_TEXT}}],
        [{"name": "turn", "parameters": PARAMETERS}],
        [{"name": "turn", "parameters": TOOL_TEXT}],
    ],
)
def test_tools_have_one_form(tools: list[Any]) -> None:
    assert read({"messages": [ASKED, ANSWERED], "tools": tools})["tools"] == [TOOL]
    functions = [tool.get("function", tool) for tool in tools]
    assert read({"messages": [ASKED, ANSWERED], "functions": functions})["tools"] == [TOOL]


@pytest.mark.parametrize("parameters", ["any", "[]", 3])
def test_parameters_that_are_no_object_are_refused(parameters: Any) -> None:
    with pytest.raises(ValueError, match=r"tool 1: 'parameters' .*object"):
        read({"messages": [ASKED, ANSWERED], "tools": [{"name": "turn", "parameters": parameters}]})


def test_a_key_that_stands_twice_in_a_cell_is_refused() -> None:
    with pytest.raises(ValueError, match="'messages': the key 'role' stands twice in one object; keep one"):
        read({"messages": '[{"role": "user", "role": "assistant", "content": "x"}]'})


@pytest.mark.parametrize("template", [TEMPLATE, "{prompt}{completion}", None])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASKED], "completion": [ANSWERED]},
        {"prompt": [ASKED], "completion": ANSWERED},
        {"prompt": [ASKED], "completion": "a"},
        {"prompt": "q", "completion": [{"from": "gpt", "value": "a"}]},
    ],
)
def test_prompt_and_completion_as_turns_are_one_conversation(row: dict[str, Any], template: str | None) -> None:
    assert read(row, template) == {"messages": [ASKED, ANSWERED]}


def test_answers_in_a_prompt_are_context() -> None:
    row = {"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED], "system": "Be short."}
    assert read(row)["messages"] == [SYSTEM, ASKED, {**ANSWERED, "train": False}, ASKED, ANSWERED]
    with pytest.raises(EmptyError):
        read({"prompt": [], "completion": [ANSWERED]})


@pytest.mark.parametrize("column", ["image", "images", "audio", "audios", "video", "videos"])
def test_columns_of_media_are_refused_by_name(column: str) -> None:
    for row in ({"messages": [ASKED, ANSWERED]}, {"caption": "of no known schema"}):
        with pytest.raises(ValueError, match=f"holds {column}; only text is trained here: remove the column"):
            read(row | {column: ["a.png"]})
    assert read({"messages": [ASKED, ANSWERED], column: []})["messages"] == [ASKED, ANSWERED]
    assert read({"question": "q", column: "a dog"}, f"{{{column}}}: {{question}}")["prompt"] == "a dog: "


def test_marks_for_media_are_refused_where_there_is_such_a_column() -> None:
    row = {"messages": [{"role": "user", "content": "<image>What is it?"}, ANSWERED]}
    assert read(row)["messages"][0]["content"] == "<image>What is it?"
    with pytest.raises(ValueError, match="has <image> in its text; only text is trained here"):
        read(row | {"images": []})
    with pytest.raises(ValueError, match="has <audio> in its text"):
        read({"question": "<audio>", "answer": "a", "audios": None}, TEMPLATE)


def test_what_nobody_reads_is_named() -> None:
    row = {"messages": [{**ASKED, "time": 3}, ANSWERED], "source": "web", "score": 0, "note": "", "tools": [TOOL]}
    assert reading(row).unread == ("source", "score", "messages.time")
    assert reading({"text": "t", "system": "s"}).unread == ("system",)
    assert reading({"instruction": "q", "input": "i", "output": "a", "id": 1}, TEMPLATE).unread == ("id",)


def test_the_row_of_a_fine_tuning_file() -> None:
    """As OpenAI's documentation has it: tools, calls with a text of arguments, weights."""
    call = {"id": "c1", "type": "function", "function": {"name": "turn", "arguments": '{"to": "left"}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "Be short."},
            ASKED,
            {"role": "assistant", "tool_calls": [call], "weight": 0},
            {"role": "tool", "tool_call_id": "c1", "content": ""},
            {**ANSWERED, "weight": 1},
        ],
        "parallel_tool_calls": False,
        "tools": [TOOL],
    }
    found = reading(row)
    made = {**call, "function": {"name": "turn", "arguments": {"to": "left"}}}
    assert found.content == {
        "messages": [
            SYSTEM,
            ASKED,
            {"role": "assistant", "content": "", "tool_calls": [made], "train": False},
            {"role": "tool", "content": "", "tool_call_id": "c1"},
            ANSWERED,
        ],
        "tools": [TOOL],
    }
    assert found.unread == ("parallel_tool_calls",)


def test_the_row_of_sharegpt_with_calls() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "turn", "arguments": {"to": "left"}}'},
            {"from": "observation", "value": "done"},
            {"from": "gpt", "value": "a"},
        ],
        "system": "Be short.",
        "tools": f'[{{"name": "turn", "parameters": {TOOL_TEXT}}}]',
    }
    call = {"type": "function", "function": {"name": "turn", "arguments": {"to": "left"}}}
    assert read(row) == {
        "messages": [
            SYSTEM,
            ASKED,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "done"},
            ANSWERED,
        ],
        "tools": [TOOL],
    }


def test_a_row_of_prompts_may_have_the_same_beside_it() -> None:
    row = {"question": "q", "system": "Be short.", "history": [["q", "a"]], "tools": [TOOL]}
    assert Schemas(None).asked(row) == {"messages": [SYSTEM, ASKED, ANSWERED, ASKED], "tools": [TOOL]}
    assert Schemas(None).asked({"prompt": [ASKED], "system": "Be short."}) == {"messages": [SYSTEM, ASKED]}
    with pytest.raises(ValueError, match=r"has system, history, tools, which prepare\.template leaves out"):
        Schemas(TEMPLATE).asked(row)
    with pytest.raises(ValueError, match="holds image"):
        Schemas(TEMPLATE).asked({"question": "q", "image": "a.png"})


def test_columns_that_the_template_wants_too_are_named_once() -> None:
    with pytest.raises(ValueError, match="no known columns") as caught:
        reading({"frage": "q"}, "{question}{answer}")
    assert str(caught.value).count("question, answer") == 1
