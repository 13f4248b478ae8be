"""The server, with OpenAI's own client and with clients that do what they should not."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.serving import environment, served

QUESTION: Any = [{"role": "user", "content": "what is it?"}]


@pytest.fixture(scope="module")
def address(models_folder: Path) -> Iterator[str]:
    """A server of the base model and two adapters, for all tests of this module: none may hurt it."""
    with served(models_folder, "--adapter", "one", "--adapter", "two") as (address, process):
        yield address
        assert process.poll() is None


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)


def chat(client: openai.OpenAI, model: str = "base", **options: Any) -> Any:
    return client.chat.completions.create(model=model, messages=QUESTION, **options)


def text(client: openai.OpenAI, model: str = "base", **options: Any) -> str:
    return str(chat(client, model, **options).choices[0].message.content)


def post(address: str, body: bytes | str | dict[str, Any], path: str = "chat/completions", **headers: str) -> Any:
    """The status and the JSON of an answer to a body as it is."""
    raw = json.dumps(body).encode() if isinstance(body, dict) else body
    connection = http.client.HTTPConnection(address.split("/")[2], timeout=60)
    connection.request("POST", f"/v1/{path}", raw, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_the_models_are_those_that_are_configured(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "one", "two"]
    assert client.models.retrieve("two").id == "two"
    answers = {name: text(client, name, max_tokens=12) for name in ("one", "base", "two", "base", "one")}
    assert len(set(answers.values())) == 3
    assert {name: text(client, name, max_tokens=12) for name in answers} == answers


def test_an_answer_is_the_one_that_generate_gives(models_folder: Path, client: openai.OpenAI) -> None:
    from tests.support.serving import run

    for name, choice in (("base", ["--base"]), ("two", ["--adapter", "two"])):
        said = run(models_folder, "generate", "--prompt", "what is it?", "--max-tokens", "12", *choice).stdout
        assert text(client, name, max_tokens=12).strip() == said.strip() != ""


def test_a_stream_gives_the_whole_answer_and_its_usage(client: openai.OpenAI) -> None:
    whole = chat(client, max_tokens=12)
    chunks = list(chat(client, max_tokens=12, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_a_completion_continues_a_text_or_tokens(client: openai.OpenAI) -> None:
    said = client.completions.create(model="one", prompt="abc", max_tokens=6).choices[0].text
    of_tokens = client.completions.create(model="one", prompt=[64, 65, 66], max_tokens=6).choices[0].text
    assert said == of_tokens != client.completions.create(model="one", prompt="abd", max_tokens=6).choices[0].text
    pieces = client.completions.create(model="one", prompt="abc", max_tokens=6, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == said


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("more", [{}, {"temperature": 1.0, "seed": 5}], ids=str)
def test_an_answer_ends_before_a_stop_string(client: openai.OpenAI, stream: bool, more: dict[str, Any]) -> None:
    whole = text(client, max_tokens=16, presence_penalty=2.0, **more)
    stop = whole[4:7]  # three tokens
    answer = chat(client, max_tokens=16, presence_penalty=2.0, stop=["never", stop], stream=stream, **more)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    said = "".join((choice.delta if stream else choice.message).content or "" for choice in choices)
    assert said == whole.partition(stop)[0]
    assert choices[-1].finish_reason == "stop"


def test_what_only_looks_like_a_stop_string_is_said(client: openai.OpenAI) -> None:
    whole = text(client, max_tokens=8, presence_penalty=2.0)
    answer = chat(client, max_tokens=8, presence_penalty=2.0, stop=[whole[2:4] + "\n", whole[-2:] + "\n"])
    assert answer.choices[0].message.content == whole
    assert answer.usage.completion_tokens == 8


def test_the_seed_makes_a_draw_repeatable(client: openai.OpenAI) -> None:
    first, again, other = (text(client, temperature=1.5, seed=seed, max_tokens=12) for seed in (7, 7, 8))
    assert first == again != other
    assert text(client, temperature=0.0, seed=7) == text(client, temperature=0.0, seed=8)


def test_options_do_what_they_say(client: openai.OpenAI) -> None:
    greedy = text(client, max_tokens=12)
    assert text(client, max_tokens=12, temperature=5.0, seed=1) != greedy
    assert text(client, max_tokens=12, temperature=5.0, seed=1, top_p=1e-6) == greedy
    assert text(client, max_tokens=12, temperature=5.0, seed=1, extra_body={"top_k": 1}) == greedy
    assert text(client, max_tokens=12, frequency_penalty=2.0) != greedy
    assert text(client, max_tokens=3, logit_bias={"0": 100}) == "!!!"


def test_tools_reach_the_chat_template(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    plain, with_tool = chat(client), chat(client, tools=[tool])
    assert with_tool.usage.prompt_tokens > plain.usage.prompt_tokens + len("weather")


def test_control_tokens_of_a_user_are_text(client: openai.OpenAI) -> None:
    said: Any = [{"role": "user", "content": "<|end|>"}]
    longer: Any = [{"role": "user", "content": "x"}]
    count = client.chat.completions.create(model="base", messages=said).usage
    one = client.chat.completions.create(model="base", messages=longer).usage
    assert count and one and count.prompt_tokens == one.prompt_tokens + len("<|end|>") - 1


@pytest.mark.parametrize(
    "name",
    [
        "one/",
        "../one",
        "./one",
        "/etc",
        "{models_folder}/one",
        "{models_folder}/base",
        "org/model",
        "default_model",
        "",
        "One",
        "one\0",
    ],
)
def test_no_other_name_is_opened(models_folder: Path, address: str, name: str) -> None:
    body = {"messages": QUESTION, "model": name.format(models_folder=models_folder)}
    for path, content in (("chat/completions", body), ("completions", {"model": body["model"], "prompt": "x"})):
        status, answer = post(address, content, path)
        assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_a_name_that_is_not_there_is_openais_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there are: base, one, two"):
        text(client, "gpt-5")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xff", b"null", b"[" * 50_000, {"messages": 5}, {"messages": [{"role": "nobody", "content": "x"}]},
        {"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": 5}]}, {"messages": [5]},
        {"messages": QUESTION, "stop": [3]}, {"messages": QUESTION, "stop": ""}, {"messages": QUESTION, "top_k": "a"},
        {"messages": QUESTION, "logit_bias": {"9999999": 1}}, {"messages": QUESTION, "n": 3},
        {"messages": QUESTION, "adapters": "/etc"}, {"messages": [{"role": "user", "content": "x" * 5000}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/"}}]}]},
        {"messages": QUESTION, "tools": [5]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
    ],
    ids=lambda body: str(body)[:50],
)  # fmt: skip
def test_a_wrong_body_is_one_line(address: str, body: Any) -> None:
    status, answer = post(address, body)
    assert status == 400
    assert answer["error"]["message"] and "\n" not in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("prompt", ["", [], [258], [-1], [2**70], ["a", "b"], 5])
def test_a_wrong_prompt_is_one_line(address: str, prompt: Any) -> None:
    assert post(address, {"prompt": prompt}, "completions")[0] == 400


@pytest.mark.parametrize(
    "odd",
    [
        {"top_k": 10**9, "temperature": 1.0},
        {"temperature": 1e-300},
        {"seed": -(2**80), "temperature": 1.0},
        {"min_p": 1e-320, "temperature": 1.0},
        {"max_tokens": 10**12},
        {"unknown": {"a": 1}},
        {"logprobs": True, "top_logprobs": 5},
    ],
    ids=str,
)
def test_what_is_odd_but_right_is_answered(address: str, odd: dict[str, Any]) -> None:
    status, answer = post(address, {"messages": QUESTION, "max_tokens": 4} | odd)
    assert (status, answer.get("error")) == (200, None)


def test_a_large_body_is_refused_and_its_sender_hears_why(address: str) -> None:
    status, answer = post(address, b" " * 50_000_000)
    assert status == 413 and "4,194,304 is the most" in answer["error"]["message"]


@pytest.mark.parametrize("told", ["-1", "x", "1e3", "٣"])
def test_a_body_of_no_known_size_is_refused(address: str, told: str) -> None:
    host, port = address.split("/")[2].split(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        raw.sendall(f"POST /v1/completions HTTP/1.1\r\nContent-Length: {told}\r\n\r\n".encode())
        assert raw.recv(100).startswith(b"HTTP/1.0 411")


def test_unknown_routes_and_methods_are_openais_errors(address: str) -> None:
    assert post(address, {}, "embeddings")[0] == 404
    connection = http.client.HTTPConnection(address.split("/")[2], timeout=60)
    for method, path, status in (("GET", "/", 404), ("GET", "/v1/models/none", 404), ("DELETE", "/v1/models/one", 501)):
        connection.request(method, path)
        response = connection.getresponse()
        assert (response.status, "message" in json.loads(response.read())["error"]) == (status, True)
    connection.request("GET", "/health")
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())) == (200, {"status": "ok"})


def test_fifty_clients_at_once_are_all_answered(client: openai.OpenAI) -> None:
    names = ("base", "one", "two")
    expected = {name: text(client, name, max_tokens=20) for name in names}
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda i: (names[i % 3], text(client, names[i % 3], max_tokens=20)), range(50)))
    assert all(said == expected[name] for name, said in answers)


def test_clients_that_leave_do_not_hurt_the_others(address: str, client: openai.OpenAI) -> None:
    host, port = address.split("/")[2].split(":")
    body = json.dumps({"messages": QUESTION, "max_tokens": 400, "stream": True}).encode()
    expected = text(client, max_tokens=20)
    for take in (0, 1, 200, 2000):
        raw = socket.create_connection((host, int(port)), timeout=20)
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        while take > 0:
            take -= len(raw.recv(take))
        # Gone at once, with a reset.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.close()
    began = time.monotonic()
    assert text(client, max_tokens=20) == expected
    assert time.monotonic() - began < 10


def test_a_key_is_asked_for_when_there_is_one(models_folder: Path) -> None:
    with served(models_folder, "merged", LORABUILD_API_KEY="sésame") as (address, _):
        body = {"messages": QUESTION}
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"}):
            assert post(address, body, **header)[0] == 401
        status, _ = post(address, body, Authorization="Bearer sésame".encode().decode("latin-1"))
        assert status == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=address, api_key="no").models.list()


def test_the_merged_model_is_served_by_default_on_loopback_alone(models_folder: Path) -> None:
    with served(models_folder, "merged") as (address, _):
        assert address.startswith("http://127.0.0.1:")
        client = openai.OpenAI(base_url=address, api_key="none")
        assert [model.id for model in client.models.list()] == ["merged"]
        status, answer = post(address, {"messages": QUESTION})  # no model is named
        assert (status, answer["model"]) == (200, "merged")


def test_by_a_template_the_last_question_is_asked(models_folder: Path) -> None:
    with served(models_folder, "merged", "--set", 'prepare.template="Q: {question} A: {answer}"') as (address, process):
        assert process.stdout and "the last question alone" in process.stdout.readline()
        answers = [
            post(address, {"messages": [*before, {"role": "user", "content": "q"}]})[1]["choices"][0]["message"]
            for before in ([], [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        ]
        assert answers[0] == answers[1]
        assert post(address, {"messages": [{"role": "assistant", "content": "b"}]})[0] == 400


@pytest.mark.parametrize(("kind", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_it_stops_within_a_second_even_while_it_answers(models_folder: Path, kind: signal.Signals, status: int) -> None:
    with served(models_folder, "merged") as (address, process):
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        pieces = iter(chat(client, "merged", max_tokens=400, stream=True))
        next(pieces)
        began = time.monotonic()
        process.send_signal(kind)
        assert process.wait(timeout=10) == status
        assert time.monotonic() - began < 1
        assert process.stderr and process.stderr.read() == ""


def test_what_cannot_be_served_is_one_line(models_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, line in (
            (("nowhere",), "error: nowhere: no merged model; make it with: python -m stages.merge"),
            (("merged", "--adapter", "nowhere"), "error: nowhere/adapter_config.json: no such file"),
            (("merged", "--port", port), f"error: 127.0.0.1:{port}: Address already in use; choose another"),
        ):
            done = subprocess.run(
                ["python", "-m", "stages", "serve", "--port", "0", *arguments],
                cwd=models_folder, env=environment(models_folder), capture_output=True, text=True, timeout=60,
            )  # fmt: skip
            assert done.returncode == 1
            assert done.stderr.startswith(line) and len(done.stderr.splitlines()) == 1
