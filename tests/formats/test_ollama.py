"""Modelfiles: a template in Go's form that writes what the chat template writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages.formats.ollama import go_template, write_modelfile
from stages.formats.turns import SystemForm, TurnForm, find_form, rendered
from tests.support.gguf_models import write_exportable
from tests.support.gguf_tokenizers import write_byte_level
from tests.support.templates import FAMILIES
from tests.support.tokenizers import tokenizer

TURNS = [("user", "하나?"), ("assistant", "one"), ("user", "둘?"), ("assistant", "two"), ("user", "셋?")]
PLAIN = "### 질문:\n{question}\n\n### 답변:\n{answer}"


def form_of(name: str) -> tuple[Any, TurnForm | None]:
    made = tokenizer(family=FAMILIES[name])
    return made, find_form(made, adds_bos=False)


@pytest.mark.parametrize("name", ["llama3", "qwen25", "gemma2", "gemma3", "phi3", "phi4", "phi4mini", "smollm2"])
def test_form_writes_what_the_chat_template_does(name: str) -> None:
    made, form = form_of(name)
    assert form is not None
    systems = [[], [("system", "Be brief.")]] if form.system else [[]]
    for system in systems:
        turns = [*system, *TURNS]
        assert form.write(turns) == rendered(made, turns, ask=True)


def test_system_prompt_has_its_place() -> None:
    assert form_of("qwen25")[1].system == SystemForm("<|im_start|>system\n", "<|im_end|>\n", inside_user=False)  # type: ignore[union-attr]
    assert form_of("gemma3")[1].system == SystemForm("", "\n\n", inside_user=True)  # type: ignore[union-attr]
    assert form_of("gemma2")[1].system is None  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["deepseek"])  # its prompt begins a thought, its answers have none
def test_template_without_a_form_of_its_own_has_none(name: str) -> None:
    assert form_of(name)[1] is None


def test_default_system_prompt_is_the_start() -> None:
    form = form_of("smollm2")[1]
    assert form is not None
    assert form.start == "<|im_start|>system\nYou are a helper.<|im_end|>\n"


def test_date_is_that_of_the_rows() -> None:
    form = find_form(tokenizer(family=FAMILIES["llama3"]), adds_bos=True, date="2025-03-04")
    assert form is not None
    assert "Today is 04 Mar 2025" in form.start


def test_bos_is_left_to_whoever_tokenises() -> None:
    made = tokenizer(family=FAMILIES["llama3"])
    with_bos, without = find_form(made, adds_bos=False), find_form(made, adds_bos=True)
    assert with_bos is not None
    assert without is not None
    assert with_bos.start == "<|begin_of_text|>" + without.start


def test_go_template_of_chatml() -> None:
    form = TurnForm("", "<U>", "<E><A>", "<E>", SystemForm("<S>", "<E>", inside_user=False))
    assert go_template(form) == (
        "{{ if .System }}<S>{{ .System }}<E>{{ end }}{{ range .Messages }}"
        '{{ if eq .Role "user" }}<U>{{ .Content }}<E><A>{{ else if eq .Role "assistant" }}{{ .Content }}<E>{{ end }}'
        "{{ end }}"
    )


def test_go_template_with_a_default_system_prompt() -> None:
    form = TurnForm("<D>", "<U>", "<A>", "<E>", SystemForm("<S>", "<E>", inside_user=False))
    assert go_template(form).startswith("{{ if .System }}<S>{{ .System }}<E>{{ else }}<D>{{ end }}{{ range")


def test_go_template_puts_a_system_prompt_into_the_first_question_alone() -> None:
    form = TurnForm("", "<U>", "<A>", "<E>", SystemForm("", "\n\n", inside_user=True))
    assert '<U>{{ if $system }}{{ $system }}\n\n{{ $system = "" }}{{ end }}{{ .Content }}<A>' in go_template(form)


def test_braces_of_a_template_stay_braces() -> None:
    assert '{{ "{{" }}U}}{{ .Content }}' in go_template(TurnForm("", "{{U}}", "", "", None))


def test_modelfile_of_a_chat_model(tmp_path: Path) -> None:
    folder = write_exportable(tmp_path / "model", "qwen3")
    made = write_modelfile(tmp_path / "Modelfile", folder, gguf="model.gguf")
    assert made.template is not None
    assert (tmp_path / "Modelfile").read_text(encoding="utf-8") == (
        f'FROM ./model.gguf\n\nTEMPLATE """{made.template}"""\nPARAMETER stop "<|im_end|>"\n'
    )
    assert "<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n" in made.template


def test_modelfile_of_a_plain_template_asks_in_its_words(tmp_path: Path) -> None:
    folder = write_exportable(tmp_path / "model", "llama")
    made = write_modelfile(tmp_path / "Modelfile", folder, gguf="base.gguf", adapter="adapter.gguf", template=PLAIN)
    assert made.template == "### 질문:\n{{ .Prompt }}\n\n### 답변:\n{{ .Response }}"
    assert made.stops == ("<|im_end|>",)
    text = (tmp_path / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith("FROM ./base.gguf\nADAPTER ./adapter.gguf\n")


@pytest.mark.parametrize(
    ("chat", "plain", "remark"),
    [
        ("{{ messages[0].content | upper }}", None, "The chat template has no plain form in Go"),
        (None, None, "The tokenizer has no chat template"),
        (None, "{title}{question}{answer}", "prepare.template has 2 columns"),
        (None, 'Q: {question}"""{answer}', 'The template holds """'),
    ],
)
def test_modelfile_says_why_it_has_no_template(
    tmp_path: Path, chat: str | None, plain: str | None, remark: str
) -> None:
    folder = write_exportable(tmp_path / "model", "llama")
    (folder / "chat_template.jinja").unlink()
    write_byte_level(folder, "llama-bpe", template=chat)
    made = write_modelfile(tmp_path / "Modelfile", folder, gguf="model.gguf", template=plain)
    assert made.template is None
    lines = (tmp_path / "Modelfile").read_text(encoding="utf-8").splitlines()
    assert any(line.startswith(f"# {remark}") for line in lines)
    assert not any(line.startswith("TEMPLATE") for line in lines)
