"""Answers in a batch and as a stream: the same text, by options that do what they say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from stages.decoding.decode import Answer, answer_all, load_decoder, stream_tokens
from stages.params.loading import load_params
from tests.support.imports import ROOT

PROMPTS = ["one", "a longer prompt than that", "x", "three of them", "가나다"]
PLAIN: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0, "seed": 0}


@pytest.fixture(scope="module")
def decoder(tiny_llama: Path) -> Any:
    return load_decoder(tiny_llama, {"eos_token_id": 257})


def ids(decoder: Any, prompts: list[str] = PROMPTS) -> list[list[int]]:
    return [decoder.encode(prompt) for prompt in prompts]


def batch(model: Any, decoder: Any, prompts: list[str] = PROMPTS, **options: Any) -> list[Answer]:
    answers = dict(answer_all(model, decoder, ids(decoder, prompts), **{"batch_size": 3, **PLAIN, **options}))
    return [answers[index] for index in range(len(prompts))]


def stream(model: Any, decoder: Any, prompt: str, **options: Any) -> str:
    return "".join(piece for piece, _ in stream_tokens(model, decoder, decoder.encode(prompt), **PLAIN | options))


PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5},
]


@pytest.mark.parametrize("options", [{}, *PENALTIES, {"max_tokens": 1}], ids=str)
@pytest.mark.parametrize("stops", [0, 1])
def test_batch_and_stream_give_the_same_text(model: Any, decoder: Any, options: dict[str, Any], stops: int) -> None:
    plain = batch(model, decoder, **options)
    # A part of each answer, which no token holds whole.
    stop = [answer.text[2:4] for answer in plain if len(answer.text) > 5][: 3 * stops]
    answers = [answer.text for answer in batch(model, decoder, stop=stop, **options)]
    assert answers == [stream(model, decoder, prompt, stop=stop, **options) for prompt in PROMPTS]


@pytest.mark.parametrize("options", PENALTIES, ids=str)
def test_penalties_are_what_their_definitions_say(model: Any, decoder: Any, options: dict[str, Any]) -> None:
    tokens = decoder.encode("abcabc")
    start = len(tokens)
    for _ in range(12):
        logits = np.array(model(mx.array([tokens]))[0, -1])
        for token, count in Counter(tokens[-20:]).items():
            factor = options.get("repetition_penalty", 1.0)
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
            logits[token] -= options.get("presence_penalty", 0.0)
            logits[token] -= options.get("frequency_penalty", 0.0) * count
        tokens.append(int(logits.argmax()))
    expected = decoder.decode(tokens[start:]).rstrip("\N{REPLACEMENT CHARACTER}").strip()
    [answer] = batch(model, decoder, ["abcabc"], max_tokens=12, **options)
    assert answer.text == expected != batch(model, decoder, ["abcabc"], max_tokens=12)[0].text


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999}], ids=str)
def test_a_draw_from_the_likeliest_token_alone_is_the_likeliest(model: Any, decoder: Any, options: Any) -> None:
    hot: dict[str, Any] = {"temperature": 5.0, "seed": 3}
    greedy = [answer.text for answer in batch(model, decoder)]
    assert [answer.text for answer in batch(model, decoder, **hot)] != greedy
    assert [answer.text for answer in batch(model, decoder, **hot, **options)] == greedy
    assert stream(model, decoder, "one", **hot, **options) == greedy[0]


def test_the_seed_makes_a_draw_repeatable(model: Any, decoder: Any) -> None:
    first, again, other = (batch(model, decoder, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_the_defaults_of_the_parameters_change_nothing(model: Any, decoder: Any) -> None:
    options = load_params(ROOT / "params.yaml").generate.model_dump() | {"max_tokens": 24}
    answers = dict(answer_all(model, decoder, ids(decoder), **options))
    assert [answers[i] for i in range(len(PROMPTS))] == batch(model, decoder, batch_size=32)


def test_an_answer_ends_before_its_stop_string(model: Any, decoder: Any) -> None:
    whole = batch(model, decoder, ["x"], presence_penalty=2.0)[0]
    stop = whole.text[3:6]
    cut = batch(model, decoder, ["x"], presence_penalty=2.0, stop=[stop, "never"])[0]
    assert cut.text == whole.text.partition(stop)[0].strip()
    assert cut.stopped and not whole.stopped
    assert cut.tokens < whole.tokens == 24


def test_one_answer_that_stops_lets_the_others_go_on(model: Any, decoder: Any) -> None:
    plain = batch(model, decoder, presence_penalty=2.0)
    answers = batch(model, decoder, presence_penalty=2.0, stop=[plain[1].text[1:5]])
    assert answers[1].stopped and answers[1].text == plain[1].text[:1].strip()
    others = [i for i in range(len(PROMPTS)) if plain[1].text[1:5] not in plain[i].text]
    assert others and all(answers[i] == plain[i] for i in others)


def test_top_k_beyond_the_vocabulary_is_one_line(model: Any, decoder: Any) -> None:
    with pytest.raises(ValueError, match="top_k"):
        stream(model, decoder, "x", temperature=1.0, top_k=5000)
