"""Conversations: the same answers as without a cache, and only new tokens are computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages.decoding.decode import stream_tokens
from stages.params import schema
from stages.params.loading import load_params
from stages.serving.conversation import Conversation
from stages.serving.models import Models, open_models


@pytest.fixture
def models(models_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Models:
    return opened(models_folder, monkeypatch)


def opened(models_folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Models:
    monkeypatch.chdir(models_folder)
    monkeypatch.setenv("LORABUILD_STORE", str(models_folder / "store"))
    merged, manifest = Path("merged"), Path("artifacts/base.json")
    return open_models(load_params(overrides=overrides), merged=merged, manifest=manifest, adapters=["one", "two"])


def options(**changes: Any) -> schema.Generate:
    overrides = [
        f"generate.{name}={value}" for name, value in ({"max_tokens": 12, "presence_penalty": 2.0} | changes).items()
    ]
    return load_params(overrides=overrides).generate


def alone(models: Models, messages: list[dict[str, str]], made: schema.Generate) -> str:
    """The answer to these turns by a model that has read nothing before."""
    ids = models.prompts.of_row({"messages": messages}).ids
    options = made.model_dump(exclude={"batch_size"})
    return "".join(piece for piece, _ in stream_tokens(models.model, models.decoder, ids, **options))


@pytest.mark.parametrize("changes", [{}, {"frequency_penalty": 1.5}, {"temperature": 0.8, "seed": 3}], ids=str)
def test_the_cache_changes_no_answer(models: Models, changes: dict[str, Any]) -> None:
    made = options(**changes)
    talk = Conversation(models, made)
    for question in ("one", "and two?", "x", "what is the third of them?"):
        before = [*talk.messages, {"role": "user", "content": question}]
        assert "".join(talk.ask(question)) == alone(models, before, made) != ""
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 4


def test_only_new_tokens_are_computed(models: Models) -> None:
    talk = Conversation(models, options())
    list(talk.ask("a first question of some length"))
    first = talk.computed
    list(talk.ask("b"))
    # At most the answer's own text, the turn's ends and the question: one token a byte.
    answer = talk.messages[1]["content"].encode()
    assert talk.computed <= len(answer) + len("<|end|>user: b<|end|>assistant: ") < first + len(answer)


def test_each_model_reads_for_itself(models: Models) -> None:
    made = options()
    talk = Conversation(models, made)
    for name in ("one", "two", "base", "one"):
        models.switch(name)
        before = [*talk.messages, {"role": "user", "content": "q"}]
        assert "".join(talk.ask("q")) == alone(models, before, made)


def test_another_model_answers_the_last_question_and_nothing_else_changes(models: Models) -> None:
    made = options()
    talk = Conversation(models, made)
    models.switch("two")
    list(talk.ask("q"))
    list(talk.ask("r"))
    turns = list(talk.messages)
    said = "".join(talk.ask_again("base"))
    assert (talk.messages, models.name) == (turns, "two")
    models.switch("base")
    assert said == alone(models, turns[:-1], made) != turns[-1]["content"]


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(models: Models) -> None:
    made = options()
    talk = Conversation(models, made)
    pieces: list[str] = []
    for piece in talk.ask("q", stopped=lambda: len(pieces) >= 3):
        pieces.append(piece)
    assert talk.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    turns = [*talk.messages, {"role": "user", "content": "r"}]
    assert "".join(talk.ask("r")) == alone(models, turns, made)


def test_an_answer_that_breaks_off_leaves_the_conversation_as_it_was(models: Models) -> None:
    made = options()
    talk = Conversation(models, made)
    list(talk.ask("q"))
    turns = list(talk.messages)
    pieces = talk.ask("broken off")
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert talk.messages == turns
    assert "".join(talk.ask("r")) == alone(models, [*turns, {"role": "user", "content": "r"}], made)


def test_a_blank_answer_is_no_turn(models: Models) -> None:
    first = "".join(Conversation(models, options(max_tokens=1)).ask("q"))
    talk = Conversation(models, options(stop=f'["{first}"]'))
    assert list(talk.ask("q")) == [] and talk.messages == []


def test_a_cleared_conversation_starts_anew(models: Models) -> None:
    talk = Conversation(models, options())
    first = "".join(talk.ask("q"))
    list(talk.ask("r"))
    talk.clear()
    assert "".join(talk.ask("q")) == first
    with pytest.raises(ValueError, match="nothing has been asked"):
        talk.clear()
        list(talk.ask_again("base"))


def test_by_a_template_each_question_is_asked_alone(models_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = opened(models_folder, monkeypatch, 'prepare.template="Q: {question} A: {answer}"')
    talk = Conversation(models, options())
    first = "".join(talk.ask("q"))
    list(talk.ask("something else"))
    assert "".join(talk.ask("q")) == first


def test_a_conversation_that_outgrows_the_context_is_one_line(models: Models) -> None:
    talk = Conversation(models, options())
    with pytest.raises(ValueError, match="the model's context is 512; shorten it"):
        list(talk.ask("x" * 600))
    assert talk.messages == []
    # And an answer ends where the context does.
    around = len(models.prompts.of_row({"messages": [{"role": "user", "content": "x"}]}).ids) - 1
    said = "".join(Conversation(models, options(max_tokens=100)).ask("x" * (512 - around - 5)))
    assert len(said) == 5
