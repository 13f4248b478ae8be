"""The places of answers in a chat template's text; templates that do not keep every turn are refused."""

from __future__ import annotations

from typing import Any

import pytest

from stages.templating.template import ChatTemplate
from stages.templating.tokenizer import TextTokenizer
from tests.support.tokenizers import CHATML, chat_template, said, tokenizer

TURNS = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "ONE"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "TWO"},
]
HEAD = "{% for m in messages %}"
TAIL = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def learned(template: str, turns: list[dict[str, str]] | None = None) -> list[str]:
    return said(chat_template(template).conversation(turns or TURNS, None))


def test_every_answer_is_found_with_its_end_of_turn() -> None:
    assert learned(CHATML) == ["ONE<|im_end|>", "TWO<|im_end|>"]


def test_a_generation_prompt_that_says_more_than_the_transcript() -> None:
    thinking = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    assert learned(thinking) == ["ONE<|im_end|>", "TWO<|im_end|>"]


def test_what_the_template_puts_before_an_answer_without_being_asked_is_learned() -> None:
    # Qwen 3 puts an empty thought before the last answer only.
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert learned(template) == ["ONE<|im_end|>", "<think>\n\n</think>\n\nTWO<|im_end|>"]


def test_an_answer_that_repeats_the_question_or_the_header() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    assert learned(CHATML, turns) == ["a<|im_end|>"]
    turns = [{"role": "user", "content": "user"}, {"role": "assistant", "content": "assistant\nassistant"}]
    assert learned(CHATML, turns) == ["assistant\nassistant<|im_end|>"]


def test_a_template_without_special_tokens() -> None:
    template = (
        "{% for m in messages %}{{ ('Q: ' if m.role == 'user' else 'A: ') + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}A: {% endif %}"
    )
    assert learned(template) == ["ONE\n", "TWO\n"]
    assert chat_template(template).conversation(TURNS, None).open_end


def test_white_space_that_the_template_trims() -> None:
    turns = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "\n yes \n"}]
    assert learned(CHATML.replace("m.content", "m.content | trim"), turns) == ["yes<|im_end|>"]
    assert learned(CHATML, turns) == ["\n yes \n<|im_end|>"]


def test_a_template_s_own_marks_go_first() -> None:
    template = (
        HEAD
        + "{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}!{% endgeneration %}"
        "<|im_end|>\n{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}" + TAIL
    )
    assert learned(template) == ["ONE!<|im_end|>", "TWO!<|im_end|>"]


def test_a_thought_that_the_template_rewords() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if '</think>' in m.content %}{{ '[' + m.content + ']' }}{% else %}{{ '(' + m.content + ')' }}{% endif %}"
        "{{ '<|im_end|>\n' }}" + TAIL
    )
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>hm</think>a"}]
    assert learned(template, turns) == ["[<think>hm</think>a]<|im_end|>"]


def test_a_call_of_a_tool_is_learned() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + '</call>' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look"}}]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ]
    assert said(chat_template(template).conversation(turns, None)) == [
        "<call>look</call><|im_end|>",
        "It rains.<|im_end|>",
    ]


NOTICED = [
    (HEAD + "{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}", "leaves out turn 1 (system)"),
    (HEAD + "{{ m.content + m.content }}{% endfor %}", "repeats turn 1 (system)"),
    ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "changes the order of the turns"),
    (HEAD + "{{ m.content[:20] }}{% endfor %}", "leaves out or changes content of turn 3 (assistant)"),
    (HEAD + "{{ m.content.split('</think>')[-1] }}{% endfor %}", "leaves out or changes content of turn 3 (assistant)"),
    (
        "{{ raise_exception('system is not for me') }}",
        "rejects the turns system, user, assistant: system is not for me",
    ),
    (HEAD + "{{ m.nothing.at.all }}{% endfor %}", "rejects the turns system, user, assistant: "),
    ("{% for", "rejects the turns system, user, assistant: "),
]


@pytest.mark.parametrize(("template", "line"), NOTICED)
def test_a_template_that_loses_content_is_noticed(template: str, line: str) -> None:
    turns = [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>a long thought</think> and the answer"},
    ]
    with pytest.raises(ValueError) as raised:
        learned(template, turns)
    assert line in str(raised.value)


def test_no_template_at_all() -> None:
    with pytest.raises(ValueError, match="the tokenizer has no chat template; give one in tokenize"):
        chat_template(None).conversation(TURNS, None)


def test_generation_marks_that_leave_out_a_turn() -> None:
    template = CHATML.replace(
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}",
        "{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}",
    )
    with pytest.raises(ValueError, match=r"generation marks leave out turn 2 \(assistant\); give another in tokenize"):
        learned(template)


def test_a_turn_without_any_words_is_refused() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"says nothing in turn 2 \(assistant\) of user, assistant"):
        learned(template, [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}])


def test_a_turn_whose_end_cannot_be_told_is_refused() -> None:
    # Without a control token, what follows an answer is other words each time.
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}"
        "{{ ' (over and out)' if loop.last else ' (over)' }}{{ '\n' }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"where turn 2 \(assistant\) of .* ends cannot be told"):
        learned(template)


def test_a_turn_that_the_template_words_by_its_content() -> None:
    template = CHATML.replace("m.content", "('!' if 'E' in m.content else '') + m.content")
    assert learned(template) == ["!ONE<|im_end|>", "TWO<|im_end|>"]


def test_a_content_that_the_template_changes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"leaves out or changes content of turn 2 \(assistant\)"):
        learned(CHATML.replace("m.content", "m.content.replace('N', 'n')"))


def test_a_tokenizer_with_a_template_of_its_own_for_tools() -> None:
    made = tokenizer()
    with_tools = "{{ tools | tojson }}" + CHATML.replace("assistant\n' }}{% endif", "assistant\n<t>' }}{% endif")
    made.chat_template = {"default": CHATML.replace("<|im_start|>", "#"), "tool_use": with_tools}
    chat = ChatTemplate(made, date="2026-01-01", control=TextTokenizer(made).control)
    assert said(chat.conversation(TURNS[1:], [{"name": "f"}])) == ["ONE<|im_end|>", "TWO<|im_end|>"]
    assert said(chat.conversation(TURNS[1:], None)) == ["ONE<|im_end|>", "TWO<|im_end|>"]


def test_tools_that_the_template_says_in_part_are_refused() -> None:
    tools = [{"function": {"name": "look", "parameters": {"properties": {"place": {"enum": ["here", "there"]}}}}}]
    names = "{% for t in tools %}{{ t.function.name }}{% endfor %}" + CHATML
    with pytest.raises(ValueError, match=r"leaves out 'place' of the tools; give one that knows them"):
        chat_template(names).conversation(TURNS, tools)
    assert said(chat_template("{{ tools | tojson }}" + CHATML).conversation(TURNS, tools))


@pytest.mark.parametrize("written", ["name", "arguments | tojson", "name + c.function.arguments.place"])
def test_a_call_that_is_not_rendered_whole_is_refused(written: str) -> None:
    calls = [{"function": {"name": "look", "arguments": {"place": "here"}}}]
    turns: list[dict[str, Any]] = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": calls}]
    end = "}}{% for c in m.tool_calls %}{{ c.function." + written + " }}{% endfor %}{{ '<|im_end|>"
    with pytest.raises(ValueError, match=r"leaves out the tool calls of turn 2 \(assistant\) of user, assistant"):
        chat_template(CHATML.replace("+ '<|im_end|>", end)).conversation(turns, None)


@pytest.mark.parametrize("number", [31, -2.5, 1e-9, 10**30])
def test_a_number_of_a_call_that_is_not_rendered_is_refused(number: float) -> None:
    calls = [{"function": {"name": "look", "arguments": {"times": [number]}}}]
    turns: list[dict[str, Any]] = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": calls}]
    start = "}}{% for c in m.tool_calls %}{{ c.function.name }} times "
    end = "{% endfor %}{{ '<|im_end|>"
    kept = CHATML.replace("+ '<|im_end|>", start + "{{ c.function.arguments.times | tojson }}" + end)
    assert len(said(chat_template(kept).conversation(turns, None))) == 1
    with pytest.raises(ValueError, match=r"leaves out the tool calls of turn 2 .*; give one that knows them"):
        chat_template(CHATML.replace("+ '<|im_end|>", start + end)).conversation(turns, None)


def test_the_start_of_the_next_turn_is_no_end_of_a_marked_answer() -> None:
    answer = "{% generation %}{{ m.content }}{% endgeneration %}"
    open_ended = HEAD + (
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        + answer
        + "{% else %}{{ m.content }}{% endif %}"
        "{{ '\n' }}"
    )
    assert learned(open_ended + TAIL) == ["ONE", "TWO"]
    assert learned((open_ended + TAIL).replace("{{ '\n' }}", "{{ '<|im_end|>\n' }}")) == [
        "ONE<|im_end|>",
        "TWO<|im_end|>",
    ]


def test_a_template_that_wants_arguments_as_text_and_no_content_gets_them() -> None:
    """As DeepSeek's are: a call is written only where there is no content, by joining strings."""
    template = (
        f"{HEAD}{{% if m.content is none %}}{{{{ '<|im_start|>assistant\n' }}}}{{% for c in m.tool_calls %}}"
        "{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}{{ '<|im_end|>\n' }}"
        f"{{% else %}}{{{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}}}{{% endif %}}{TAIL}"
    )
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "부산", "days": 2}}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "no"},
        {"role": "assistant", "content": "It is dry."},
    ]
    made = chat_template(template)
    expected = ['weather {"city": "부산", "days": 2}<|im_end|>', "It is dry.<|im_end|>"]
    assert said(made.conversation(turns, None)) == expected
    assert made.ask(turns[:3], None).endswith(expected[0] + "\n<|im_start|>tool\nno<|im_end|>\n<|im_start|>assistant\n")
