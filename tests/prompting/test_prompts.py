"""Prompts are rendered and tokenized as training rows begin."""

from __future__ import annotations

from typing import Any

import pytest

from stages.encoding.encoder import Encoder
from stages.prepared.row import PreparedRow
from stages.prompting.prompts import Prompts
from stages.schemas.schemas import Schemas
from tests.support.tokenizers import CHATML, options, tokenizer


def prompts(
    made: Any,
    template: str | None = "Q: {question}\nA: {answer}",
    columns: dict[str, str] | None = None,
    **changes: Any,
) -> Prompts:
    return Prompts(made, template=template, columns=columns or {}, normalize="NFC", options=options(**changes))


@pytest.mark.parametrize("template", ["Q: {question}\nA: {answer}", None])
@pytest.mark.parametrize("bos", [False, True])
def test_a_prompt_is_the_start_of_its_training_row(template: str | None, bos: bool) -> None:
    made = tokenizer(bos=bos, template="<s>" + CHATML if bos else CHATML)
    row = {"question": "why?", "answer": "so."}
    schemas = Schemas(template)
    content = schemas.read(row, schemas.detect(row)).content
    [encoded] = Encoder(made, options()).encode([PreparedRow("1", "f:1", **content)])
    ids = prompts(made, template).of_row({"question": "why?"}).ids
    trained = encoded.rows[0].loss_mask.argmax()
    assert encoded.rows[0].input_ids[:trained].tolist() == ids


def test_what_a_row_of_prompts_may_have() -> None:
    maker = prompts(tokenizer())
    assert maker.of_row({"question": "q"}).text == "Q: q\nA: "
    assert maker.of_row({"instruction": "q"}).text == "Q: q\nA: "
    assert maker.of_row({"prompt": "raw"}).text == "raw"
    talk = {"messages": [{"role": "user", "content": "q"}]}
    assert maker.of_row(talk).text == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert prompts(tokenizer(), columns={"question": "Frage"}).of_row({"Frage": "q"}).text == "Q: q\nA: "
    with pytest.raises(ValueError, match="has no 'question'"):
        maker.of_row({"other": "q"})


def test_words_take_the_question_s_place() -> None:
    assert prompts(tokenizer()).of_words("q").text == "Q: q\nA: "
    assert prompts(tokenizer(), "{a}{b}{c}").of_words("q").text == "q"
    assert prompts(tokenizer(), None).of_words("q").text.endswith("user\nq<|im_end|>\n<|im_start|>assistant\n")


TALK = {"messages": [{"role": "user", "content": "q <|im_end|>"}]}


def test_a_control_token_that_a_prompt_spells_is_text() -> None:
    made = tokenizer()
    end = made.convert_tokens_to_ids("<|im_end|>")
    for fields in (TALK, {"prompt": "q <|im_end|>"}, {"question": "q <|im_end|>"}):
        text, allowed = (prompts(made, special_in_content=mode).of_row(fields) for mode in ("text", "allow"))
        assert allowed.ids.count(end) == text.ids.count(end) + 1
        assert text.text == allowed.text
        with pytest.raises(ValueError, match=r"spells the control token <\|im_end\|>, which tokenize"):
            prompts(made, special_in_content="error").of_row(fields)
    assert prompts(made, None).of_words("<|im_end|>").ids.count(end) == 1
    assert prompts(made, "{a}{b}{c}").of_words("<|im_end|>").ids.count(end) == 0


def test_a_prompt_has_the_date_and_no_dropped_thoughts() -> None:
    template = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.thinking }}{{ m.content }}{% endfor %}"
    turns = [{"role": "assistant", "content": "b", "reasoning_content": "hm"}, {"role": "user", "content": "c"}]
    row = {"messages": [{"role": "user", "content": "a"}, *turns]}
    assert prompts(tokenizer(), chat_template=template, date="2031-01-01").of_row(row).text == "2031ahmbc"
    assert prompts(tokenizer(), chat_template=template, thoughts="drop").of_row(row).text == "2026abc"


def test_tools_that_the_template_does_not_know_are_refused() -> None:
    row = {**TALK, "tools": [{"name": "f"}]}
    with pytest.raises(ValueError, match="the chat template leaves out the tools; give one that knows them"):
        prompts(tokenizer()).of_row(row)
    assert (
        prompts(tokenizer(), chat_template="{{ tools | tojson }}").of_row(row).text
        == '[{"type": "function", "function": {"name": "f"}}]'
    )
