"""Requests: what is refused, in one line, and what the others become for mlx-lm."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stages.params.loading import load_params
from stages.serving.requests import Refusal, for_mlx_lm, read_request
from tests.support.imports import ROOT

CHAT = {"messages": [{"role": "user", "content": "q"}]}


WRONG: list[dict[str, Any]] = [
    {"max_tokens": 0},
    {"max_tokens": "5"},
    {"max_tokens": 1.5},
    {"temperature": -1},
    {"temperature": True},
    {"top_p": 0},
    {"top_p": 1.1},
    {"top_k": -1},
    {"min_p": 1.0},
    {"presence_penalty": 3},
    {"frequency_penalty": "x"},
    {"repetition_penalty": 0},
    {"seed": 1.5},
    {"stop": ""},
    {"stop": ["a", ""]},
    {"stop": [1]},
    {"stop": {"a": 1}},
    {"logit_bias": {"1": "x"}},
    {"logit_bias": [1]},
    {"top_logprobs": 100},
    {"n": 2},
    {"stream": "yes"},
    {"stream_options": True},
    {"model": 5},
    {"response_format": {"type": "json_object"}},
    {"adapters": "/etc"},
    {"draft_model": "org/name"},
    {"chat_template_kwargs": {}},
    {"tools": {}},
]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b"\xff\xfe", "the body is not JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b'{"messages": []}', "messages: "),
        (b'{"messages": "hi"}', "messages: "),
        (b'{"messages": ["hi"]}', "messages.0: "),
        (b"{}", "messages: field required"),
        *((json.dumps(CHAT | fields).encode(), next(iter(fields))) for fields in WRONG),
        (b'{"messages": [{}], "temperature": NaN}', "NaN is no number"),
        (b'{"messages": [{}], "temperature": -Infinity}', "-Infinity is no number"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_request_is_refused_in_one_line(body: bytes, message: str) -> None:
    with pytest.raises(Refusal) as refused:
        read_request(body, chat=True)
    error = json.loads(refused.value.body)["error"]
    assert error["message"].startswith(message) or message in error["message"]
    assert "\n" not in error["message"] and error["type"] == "invalid_request_error"
    assert refused.value.status == 400


@pytest.mark.parametrize("prompt", ["", [], [-1], ["a"], None, 5])
def test_a_completion_wants_a_text_or_tokens(prompt: Any) -> None:
    with pytest.raises(Refusal, match="prompt"):
        read_request(json.dumps({"prompt": prompt}).encode(), chat=False)


def made(**fields: Any) -> dict[str, Any]:
    read = read_request(json.dumps(CHAT | fields).encode(), chat=True)
    return for_mlx_lm(read, load_params(ROOT / "params.yaml").generate, vocabulary=258)


def test_what_is_left_open_the_parameters_say() -> None:
    plain = load_params(ROOT / "params.yaml").generate
    assert made()["max_tokens"] == plain.max_tokens
    assert made(max_tokens=None)["max_tokens"] == plain.max_tokens
    assert made(max_tokens=5)["max_tokens"] == 5
    assert made(max_tokens=5, max_completion_tokens=7)["max_tokens"] == 7
    assert made(stop="x")["stop"] == ["x"]


def test_what_would_end_mlx_lms_thread_does_not_reach_it() -> None:
    assert made(top_k=258)["top_k"] == 0
    assert made(top_k=257)["top_k"] == 257
    assert made(temperature=1e-300)["temperature"] == 0.0
    assert made(temperature=1, seed=-1)["seed"] == 2**64 - 1
    assert "seed" not in made(temperature=0, seed=5)
    assert made(logit_bias={"257": 5})["logit_bias"] == {"257": 5}
    for token in ("258", "-1", "x", "٣", "1.0"):
        with pytest.raises(Refusal, match="logit_bias"):
            made(logit_bias={token: 5})
