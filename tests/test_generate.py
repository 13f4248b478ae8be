"""The generate command: one prompt to the terminal, by one model or by several in turn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.generate import generate
from tests.support.serving import run

Said = Callable[..., str]


@pytest.fixture
def said(in_models_folder: Path, capsys: pytest.CaptureFixture[str]) -> Said:
    """What is printed when a prompt is answered."""

    def answer(**options: Any) -> str:
        capsys.readouterr()
        generate(Path("merged"), **{"prompt": "what is it?", "max_tokens": 16, **options})
        return capsys.readouterr().out

    return answer


def test_the_prompt_may_come_from_standard_input(in_models_folder: Path, said: Said) -> None:
    plain = said()
    assert plain.strip()
    arguments = ("generate", "merged", "--prompt", "-", "--max-tokens", "16")
    for typed in ("what is it?", "what is it?\n"):
        assert run(in_models_folder, *arguments, typed=typed).stdout == plain
    done = run(in_models_folder, *arguments, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: standard input is empty")


def test_base_and_adapters_answer_in_turn(in_models_folder: Path, said: Said) -> None:
    alone = [said(**choice) for choice in ({"base": True}, {"adapters": ["one"]}, {"adapters": ["two"]})]
    assert len(set(alone)) == 3
    arguments = ("generate", "--prompt", "what is it?", "--max-tokens", "16")
    done = run(in_models_folder, *arguments, "--base", "--adapter", "one", "--adapter", "zwei=two")
    assert done.stdout == "".join(alone)
    assert re.findall(r"^(\w+) \(switched in [\d.]+ ms\)$", done.stderr, re.MULTILINE) == ["base", "one", "zwei"]


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 3},
        {"temperature": 3.0, "seed": 1},
        {"repetition_penalty": 10.0},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"overrides": ["generate.presence_penalty=2"]},
    ],
    ids=str,
)
def test_an_option_changes_the_answer(said: Said, options: dict[str, Any]) -> None:
    assert said(**options) != said()


@pytest.mark.parametrize("option", [{"top_p": 1e-6}, {"top_k": 1}, {"min_p": 0.999}], ids=str)
def test_a_draw_is_narrowed(said: Said, option: dict[str, Any]) -> None:
    assert said(temperature=3.0, seed=1, **option) == said() != said(temperature=3.0, seed=1)


def test_an_answer_stops_before_a_string(said: Said) -> None:
    whole = said(presence_penalty=2.0).strip()
    cut = said(presence_penalty=2.0, stop=["never", whole[3:6]])
    assert cut.strip() == whole.partition(whole[3:6])[0].strip()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"top_p": 0.0}, "--set generate.top_p=0.0: must be greater than 0"),
        ({"top_p": 1.5}, "--set generate.top_p=1.5: must be less than or equal to 1"),
        ({"top_k": -1}, "--set generate.top_k=-1: must be greater than or equal to 0"),
        ({"min_p": 1.0}, "--set generate.min_p=1.0: must be less than 1"),
        ({"max_tokens": 0}, "--set generate.max_tokens=0: must be greater than or equal to 1"),
        ({"repetition_penalty": 0.0}, "--set generate.repetition_penalty=0.0: must be greater than 0"),
        ({"presence_penalty": 3.0}, "--set generate.presence_penalty=3.0: must be less than or equal to 2"),
        ({"frequency_penalty": -3.0}, "--set generate.frequency_penalty=-3.0: must be greater than"),
        ({"temperature": -1.0}, "--set generate.temperature=-1.0: must be greater than or equal to 0"),
        ({"seed": -1}, "--set generate.seed=-1: must be greater than or equal to 0"),
        ({"stop": ["a", ""]}, '--set generate.stop=["a", ""]: string should have at least 1 character'),
        ({"adapters": ["nowhere"]}, "nowhere/adapter_config.json: no such file"),
        ({"adapters": ["one", "x/one"]}, "--adapter x/one: the name one is taken"),
        ({"prompt": None, "top_k": 3}, "--adapter, --base and the options of an answer go with --prompt"),
        ({"prompt": None, "max_tokens": None, "base": True}, "--adapter, --base and the options of an answer go with"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_one_line(said: Said, options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError) as error:
        said(**options)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_prompts_of_a_file_are_written_as_the_parameters_say(in_models_folder: Path, said: Said) -> None:
    rows = [
        {"prompt": "what is it?"},
        {"question": "what is it?"},
        {"messages": [{"role": "user", "content": "what is it?"}]},
    ]
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    overrides = ["generate.presence_penalty=2", "generate.max_tokens=16"]
    generate(Path("merged"), prompts=Path("asked.jsonl"), out=Path("samples"), overrides=overrides)
    samples = [json.loads(line) for line in Path("samples/samples.jsonl").read_text().splitlines()]
    assert [sample["merged"] for sample in samples] == [said(presence_penalty=2.0).strip()] * 3
