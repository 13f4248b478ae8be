"""Answers in the chat templates of well-known families, compared with generation marks in the templates."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.encoding.encoder import Encoded, Encoder
from stages.prepared.row import PreparedRow
from stages.templating.render import render
from stages.templating.tokenizer import TextTokenizer
from tests.support.templates import FAMILIES
from tests.support.tokenizers import chat_template, options, said, tokenizer

Turn = dict[str, Any]
TOKENIZERS = {name: tokenizer(family=family) for name, family in FAMILIES.items()}
TALK: list[Turn] = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "ONE"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "TWO"},
]
SYSTEM: Turn = {"role": "system", "content": "Be short."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def call(**arguments: Any) -> Turn:
    return {"role": "assistant", "content": "", "tool_calls": [called(**arguments)]}


def called(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


USE: list[Turn] = [
    {"role": "user", "content": "Rain in Busan?"},
    call(city="Busan"),
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And in Daegu?"},
    call(city='"Daegu"\n'),
    {"role": "tool", "content": ""},
    {"role": "assistant", "content": "No."},
]


def measured(name: str, turns: list[Turn], tools: Any = None) -> list[str]:
    """The texts that the marks in the family's template make learned."""
    names = dict(TOKENIZERS[name].special_tokens_map)
    made = render(FAMILIES[name].marked, turns, tools, ask=False, date="2026-01-01", names=names)
    return [made.text[start:end] for start, end in made.generated or ()]


def found(name: str, turns: list[Turn], tools: Any = None) -> list[str]:
    return said(chat_template(FAMILIES[name].template, family=FAMILIES[name]).conversation(turns, tools))


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_of_a_talk(name: str) -> None:
    answers = found(name, TALK)
    assert answers == measured(name, TALK)
    assert all(word in answer for word, answer in zip(("ONE", "TWO"), answers, strict=True))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("gemma2", "mistral", "gemma3")])
def test_an_assistant_that_speaks_first(name: str) -> None:
    assert found(name, TALK[1:]) == measured(name, TALK[1:])
    assert found(name, [SYSTEM, *TALK[1:]]) == measured(name, [SYSTEM, *TALK[1:]])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gemma2"])
def test_a_system_prompt(name: str) -> None:
    assert found(name, [SYSTEM, *TALK]) == measured(name, [SYSTEM, *TALK])


@pytest.mark.parametrize("name", ["llama3", "qwen25", "qwen3", "mistral", "glm", "harmony"])
def test_calls_of_tools_and_answers_after_them(name: str) -> None:
    assert found(name, USE, TOOLS) == measured(name, USE, TOOLS)
    # A call without a string in it.
    turns = [*USE[:1], call(), *USE[2:4], *USE[4:5], call(days=3), *USE[6:]]
    assert found(name, turns, TOOLS) == measured(name, turns, TOOLS)


@pytest.mark.parametrize("name", ["qwen25", "qwen3", "mistral", "deepseek", "glm"])
def test_several_calls_in_a_turn(name: str) -> None:
    tools = None if name == "deepseek" else TOOLS
    turn = {"role": "assistant", "content": "", "tool_calls": [called(city="a"), called(city="b")]}
    results = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    turns = [*USE[:1], turn, *results, *USE[3:5], turn, *results]
    assert found(name, turns, tools) == measured(name, turns, tools)


@pytest.mark.parametrize("name", ["gemma3", "phi3", "phi4", "smollm2", "smollm3", "deepseek", "command_r", "phi4mini"])
def test_what_a_template_leaves_out_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"the chat template (leaves out|rejects)"):
        found(name, USE, TOOLS)
    if name not in ("gemma3", "deepseek"):
        with pytest.raises(ValueError, match=r"leaves out the tool calls of turn 2 \(assistant\) of user, assistant"):
            found(name, USE[:2])
    if name != "smollm3":
        with pytest.raises(ValueError, match=r"the chat template leaves out the tools; give one"):
            found(name, TALK, TOOLS)


@pytest.mark.parametrize("name", ["qwen3", "glm", "harmony"])
def test_thoughts_that_are_left_out_of_earlier_turns_are_counted(name: str) -> None:
    turns = [turn | {"reasoning_content": f"hm{i}"} if i % 2 else turn for i, turn in enumerate(TALK)]
    made = chat_template(FAMILIES[name].template, family=FAMILIES[name]).conversation(turns, None)
    assert said(made) == measured(name, turns)
    assert made.thoughts_left_out == 1
    assert "hm1" not in made.text
    assert [made.text[a:b] for answer in made.answers for a, b in answer.thoughts] == ["hm3"]


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"qwen3", "glm", "harmony"}))
def test_thoughts_that_no_turn_keeps_are_refused(name: str) -> None:
    turns = [*TALK[:3], {**TALK[3], "reasoning_content": "hm"}]
    with pytest.raises(ValueError, match=r"turn 4 \(assistant\): its thought; .* or set tokenize.thoughts: drop"):
        found(name, turns)


def test_a_thought_within_the_content() -> None:
    turns = [*TALK[:3], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTWO"}]
    assert found("qwen3", turns) == ["ONE<|im_end|>", "<think>\nhm\n</think>\n\nTWO<|im_end|>"]
    with pytest.raises(ValueError, match="its thought"):
        found("deepseek", turns)


def test_a_word_of_the_system_prompt_that_the_template_takes_as_a_switch() -> None:
    turns = [{"role": "system", "content": "Be short. /no_think"}, *TALK]
    assert found("smollm3", turns) == ["ONE<|im_end|>", "TWO<|im_end|>"]


CONTENTS = ("a", "b c", " d ", "e\n", "\n\nf", "g<think>", "user", "assistant\n", "ONE", "{", '"', "한")
THOUGHTS = ("</think>", "<think>h</think>i")
CALLING = {"llama3", "qwen25", "qwen3", "mistral", "glm", "harmony"}
THINKING = {"qwen3", "glm", "harmony"}
STRICT = {"gemma2", "gemma3", "mistral"}  # a question before each answer


def texts(name: str, *extra: str) -> st.SearchStrategy[str]:
    pieces = st.sampled_from([*CONTENTS, *FAMILIES[name].control, *extra])
    return st.lists(pieces, min_size=1, max_size=3).map("".join)


@st.composite
def conversations(draw: st.DrawFn, name: str) -> tuple[list[Turn], Any]:
    """Turns of any kind, most of them in a way that the family knows."""

    def usual(known: bool) -> bool:
        """Mostly what the family knows, now and then what it does not."""
        return known if draw(st.integers(0, 9)) else not known

    text = texts(name)
    turns: list[Turn] = []
    said = texts(name, *THOUGHTS) if usual(name in THINKING) else text
    tools = TOOLS if usual(name in CALLING) and draw(st.booleans()) else None
    if usual(name != "gemma2") and draw(st.booleans()):
        turns.append({"role": "system", "content": draw(text)})
    for _ in range(draw(st.integers(1, 3))):
        if usual(True) if name in STRICT else draw(st.integers(0, 3)):
            turns.append({"role": "user", "content": draw(text)})
        if tools and draw(st.booleans()):
            arguments = {"city": draw(text), "days": draw(st.sampled_from([1, None, ["x"]]))}
            turns.append({**call(**arguments), "content": draw(st.sampled_from(["", "", "Look:"]))})
            turns += [{"role": "tool", "content": draw(text | st.just(""))} for _ in range(draw(st.integers(1, 2)))]
        turns.append({"role": "assistant", "content": draw(said)})
        if name in THINKING and draw(st.booleans()):
            turns[-1]["reasoning_content"] = draw(text)
        if draw(st.integers(0, 5)) == 0:
            turns[-1]["train"] = False
    return turns, tools


@cache
def encoder(name: str) -> Encoder:
    return Encoder(TOKENIZERS[name], options(max_length=100_000))


def encoded(name: str, turns: list[Turn], tools: Any) -> Encoded:
    [result] = encoder(name).encode([PreparedRow("1", "f:1", messages=turns, tools=tools)])
    return result


def trained(name: str, result: Encoded) -> str:
    [row] = result.rows
    ids = row.input_ids[row.loss_mask].tolist()
    return str(TOKENIZERS[name].decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def expected(name: str, turns: list[Turn], tools: Any) -> str:
    """By the marks: the words of each assistant's turn that is trained, and EOS where the last has no end."""
    control = TextTokenizer(TOKENIZERS[name]).control
    answers = measured(name, control.hide(turns), control.hide(tools))
    roles = [turn for turn in turns if turn["role"] == "assistant"]
    kept = [answer for answer, turn in zip(answers, roles, strict=True) if turn.get("train") is not False]
    eos = FAMILIES[name].eos if name == "glm" and roles[-1].get("train") is not False else ""
    return control.show("".join(kept)) + eos


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_is_trained_is_what_the_assistant_says(name: str, data: st.DataObject) -> None:
    turns, tools = data.draw(conversations(name))
    result = encoded(name, turns, tools)
    if result.reason == "bad":
        assert result.message.startswith("f:1: ")
        return
    wanted = expected(name, turns, tools)
    assert (trained(name, result) if result.rows else "") == wanted
    # Another turn's words change nothing of it.
    other = data.draw(st.integers(0, len(turns) - 1))
    if turns[other]["role"] != "assistant" and turns[other]["content"].strip():
        changed = [
            *turns[:other],
            {**turns[other], "content": data.draw(st.sampled_from(["z", "ONE", "<think>q</think>"]))},
        ]
        again = encoded(name, changed + turns[other + 1 :], tools)
        assert again.reason == "bad" or (trained(name, again) if again.rows else "") == wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_make_up_the_turns(name: str) -> None:
    result = encoded(name, [*TALK[:3], TALK[3] | {"train": False}], None)
    assert result.counts["assistant_turns"] == 2
    assert (result.counts["trained_answers"], result.counts["answers_masked"]) == (1, 1)
    assert json.dumps(result.counts)


@pytest.mark.parametrize("arguments", [{}, {"days": 3}, {"city": None}])
def test_a_call_and_a_result_without_text_part_two_answers_whose_thought_is_left_out(arguments: dict[str, Any]) -> None:
    turns = [TALK[0], {**call(**arguments), "reasoning_content": "hm"}, {"role": "tool", "content": ""}, *TALK[1:]]
    made = chat_template(FAMILIES["qwen3"].template, family=FAMILIES["qwen3"])
    [first, second, last] = said(made.conversation(turns, TOOLS))
    written = json.dumps(arguments)
    assert first == f'<tool_call>\n{{"name": "weather", "arguments": {written}}}\n</tool_call><|im_end|>'
    assert (second, last) == ("ONE<|im_end|>", "<think>\n\n</think>\n\nTWO<|im_end|>")
