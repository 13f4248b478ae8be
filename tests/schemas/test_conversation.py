"""Turns of any spelling become messages in one form, or are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from stages.schemas.conversation import messages_of
from stages.schemas.text import EmptyError

ASKED = {"role": "user", "content": "Which way?"}


def read(*turns: Any) -> list[dict[str, Any]]:
    return messages_of(list(turns), "messages")[0]


def answer(**fields: Any) -> dict[str, Any]:
    [_, made] = read(ASKED, {"role": "assistant", "content": "Left.", **fields})
    return made


def called(name: str = "turn", **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    "flag",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"train": False},
        {"training": False},
        {"trainable": False},
        {"loss": 0},
        {"masked": True},
    ],
)
def test_a_flag_marks_an_answer_as_not_to_be_learned(flag: dict[str, Any]) -> None:
    assert answer(**flag) == {"role": "assistant", "content": "Left.", "train": False}


@pytest.mark.parametrize(
    "flag",
    [{"weight": 1}, {"weight": 1.0}, {"train": True}, {"training": True}, {"trainable": None}, {"masked": False}, {}],
)
def test_a_flag_that_says_to_learn_is_left_out(flag: dict[str, Any]) -> None:
    assert answer(**flag) == {"role": "assistant", "content": "Left."}


def test_one_flag_of_two_is_enough() -> None:
    assert answer(weight=1, train=False)["train"] is False


@pytest.mark.parametrize("value", [0.5, 2, -1, "false", [0]])
def test_half_a_weight_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"turn 2 \(assistant\): 'weight' is .*make it 1 or 0"):
        answer(weight=value)


def test_flags_of_other_turns_say_nothing() -> None:
    assert read({**ASKED, "weight": 0, "train": False}) == [ASKED]


@pytest.mark.parametrize(
    ("given", "role"),
    [("human", "user"), ("gpt", "assistant"), ("observation", "tool"), ("tool_response", "tool"), ("function", "tool"),
     ("developer", "system")],
)  # fmt: skip
def test_roles_of_other_spellings(given: str, role: str) -> None:
    assert read({"from": given, "value": "x"}) == [{"role": role, "content": "x"}]


def test_a_call_is_an_object_with_an_object_of_arguments() -> None:
    text = {"id": "c1", "type": "function", "function": {"name": "turn", "arguments": '{"to": "left", "by": null}'}}
    made = {"id": "c1", **called(to="left", by=None)}
    assert answer(tool_calls=[text]) == {"role": "assistant", "content": "Left.", "tool_calls": [made]}
    assert answer(tool_calls=[made])["tool_calls"] == [made]
    assert answer(tool_calls=[{"name": "turn", "arguments": {"to": "left"}}])["tool_calls"] == [called(to="left")]
    assert answer(tool_calls=[{"function": {"name": "turn"}}])["tool_calls"] == [called()]


def test_calls_that_run_together_stay_together() -> None:
    calls = [{"id": str(i), **called(to=i)} for i in range(2)]
    assert answer(content=None, tool_calls=calls) == {"role": "assistant", "content": "", "tool_calls": calls}


@pytest.mark.parametrize("arguments", ["left", "[1]", "3", "", "{'to': 'left'}", [1], 3])
def test_arguments_that_are_no_object_are_refused(arguments: Any) -> None:
    with pytest.raises(ValueError, match=r"turn 2 \(assistant\): 'tool_calls', call 1: 'arguments'.*object"):
        answer(tool_calls=[{"function": {"name": "turn", "arguments": arguments}}])


def test_a_key_that_stands_twice_in_arguments_is_refused() -> None:
    with pytest.raises(ValueError, match="'arguments': the key 'to' stands twice in one object"):
        answer(tool_calls=[{"function": {"name": "turn", "arguments": '{"to": 1, "to": 2}'}}])


@pytest.mark.parametrize(
    ("calls", "line"),
    [
        ([3], "call 1 must be an object"),
        ([{"function": {"arguments": {}}}], "call 1 has no 'name'; name the function"),
        ([{"type": "custom", "custom": {}}], "call 1 calls no function .*only functions are known"),
        ("nonsense", "is text, but not JSON"),
    ],
)
def test_calls_of_another_form_are_refused(calls: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        answer(tool_calls=calls)


def test_the_old_function_call_becomes_a_tool_call() -> None:
    turns = read(
        ASKED,
        {"role": "assistant", "content": None, "function_call": {"name": "turn", "arguments": '{"to": "left"}'}},
        {"role": "function", "name": "turn", "content": "done"},
    )
    assert turns[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [called(to="left")]},
        {"role": "tool", "content": "done", "name": "turn"},
    ]
    with pytest.raises(ValueError, match="has calls in two places"):
        answer(function_call={"name": "turn"}, tool_calls=[called()])


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
def test_a_turn_of_calls_as_json_text(role: str) -> None:
    one = {"from": role, "value": '{"name": "turn", "arguments": {"to": "left"}}'}
    two = {"from": role, "value": '[{"name": "turn", "arguments": "{}"}, {"name": "stop", "arguments": {}}]'}
    assert read(one, two) == [
        {"role": "assistant", "content": "", "tool_calls": [called(to="left")]},
        {"role": "assistant", "content": "", "tool_calls": [called(), called("stop")]},
    ]
    with pytest.raises(ValueError, match=r"turn 1 \(.*_call\).*is text, but not JSON; it must be a call such as"):
        read({"from": role, "value": "turn left"})


def test_only_an_assistant_calls() -> None:
    with pytest.raises(ValueError, match=r"turn 1 \(user\) has 'tool_calls'; only an assistant's turn calls tools"):
        read({**ASKED, "tool_calls": [called()]})
    assert read({**ASKED, "tool_calls": []}) == [ASKED]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking"])
def test_thoughts_have_one_name(name: str) -> None:
    assert answer(**{name: "Hm."}) == {"role": "assistant", "content": "Left.", "reasoning_content": "Hm."}
    assert answer(**{name: " \n"}) == {"role": "assistant", "content": "Left."}
    with pytest.raises(ValueError, match=f"'{name}' must be text, not list"):
        answer(**{name: ["Hm."]})


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Which "}, {"type": "input_text", "text": "way"}, "?"]
    assert read({"role": "user", "content": parts}) == [ASKED]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video", "tool_use", "thinking"])
def test_parts_that_are_no_text_are_refused_by_name(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"turn 1 \(user\): part 2 of 'content' is of type '{kind}'; only text is"):
        read({"role": "user", "content": [{"type": "text", "text": "x"}, {"type": kind, kind: {}}]})


def test_a_part_without_its_text_is_refused() -> None:
    with pytest.raises(ValueError, match="part 1 of 'content' has no 'text'; give it one"):
        read({"role": "user", "content": [{"type": "text"}]})


@pytest.mark.parametrize("content", ["", " \n", "\u200b", None, []])
def test_a_blank_system_turn_goes_and_a_blank_result_stays(content: Any) -> None:
    turns = read({"role": "system", "content": content}, ASKED, {"role": "tool", "content": content})
    assert [turn["role"] for turn in turns] == ["user", "tool"]


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("content", ["", "\u200b\ufeff", []])
def test_a_blank_question_or_answer_leaves_nothing_to_learn(role: str, content: Any) -> None:
    with pytest.raises(EmptyError):
        read(ASKED, {"role": role, "content": content})


def test_a_conversation_of_nothing_is_empty() -> None:
    for turns in ([], [{"role": "system", "content": ""}]):
        with pytest.raises(EmptyError):
            read(*turns)


def test_fields_that_nobody_reads_are_named() -> None:
    call = {"index": 0, "type": "function", "function": {"name": "f", "arguments": {}, "strict": True}}
    turns = [
        {**ASKED, "name": "Ann", "weight": 1, "time": None, "tags": [], "note": " "},
        {"role": "assistant", "content": "", "tool_calls": [call], "model": "m"},
        {"role": "tool", "content": "x", "name": "f", "tool_call_id": "c1"},
    ]
    messages, unread = messages_of(turns, "messages")
    assert unread == {"messages.name", "messages.index", "messages.strict", "messages.model"}
    assert messages[0] == ASKED
    assert messages[2] == {"role": "tool", "content": "x", "name": "f", "tool_call_id": "c1"}


@pytest.mark.parametrize(
    "said",
    [
        {"content": None, "refusal": "Left."},
        {"content": "", "refusal": "Left."},
        {"content": [{"type": "refusal", "refusal": "Left."}]},
        {"content": "Left.", "refusal": None},
    ],
)
def test_a_refusal_is_an_answer(said: dict[str, Any]) -> None:
    assert answer(**said) == {"role": "assistant", "content": "Left."}


def test_a_refusal_beside_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"turn 2 \(assistant\) has a 'content' and a 'refusal'; keep the one"):
        answer(refusal="No.")
    with pytest.raises(ValueError, match="'refusal' must be text, not list"):
        answer(content=None, refusal=["No."])


def test_a_turn_without_content_is_refused_with_the_fields_that_it_has() -> None:
    with pytest.raises(ValueError, match=r"turn 1 \(human\) has no 'content' \(it has: from, text\); give it one"):
        read({"from": "human", "text": "Which way?", "value": None})


def test_two_names_of_a_thought_say_the_same_or_are_refused() -> None:
    assert answer(reasoning_content="Hm.", thinking="Hm.")["reasoning_content"] == "Hm."
    assert answer(reasoning_content="", thinking="Hm.")["reasoning_content"] == "Hm."
    with pytest.raises(ValueError, match="'reasoning_content' and 'thinking' say different things; keep one"):
        answer(reasoning_content="Hm.", thinking="Oh.")


@pytest.mark.parametrize(
    ("turn", "fields"),
    [
        ({"tool_calls": [{"name": "f", "arguments": {}, "result": "r"}]}, {"result"}),
        ({"tool_calls": [{"name": "f", "arguments": {}, "parameters": {"to": "left"}}]}, {"parameters"}),
        ({"tool_calls": '[{"function": {"name": "f", "strict": true}, "index": 0}]'}, {"strict", "index"}),
        ({"function_call": {"name": "f", "arguments": "{}", "note": "n"}}, {"note"}),
        ({"role": "function_call", "content": '{"name": "f", "arguments": {}, "note": "n"}'}, {"note"}),
        ({"tool_calls": [{"name": "f", "parameters": {}, "result": None}]}, set()),
        ({"function_call": {"name": "f", "arguments": "{}"}, "tool_calls": []}, set()),
    ],
)
def test_fields_of_calls_that_nobody_reads_are_named(turn: dict[str, Any], fields: set[str]) -> None:
    _, unread = messages_of([{"role": "assistant", "content": "", **turn}], "messages")
    assert unread == {f"messages.{field}" for field in fields}
