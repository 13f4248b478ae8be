"""The chat command: lines from a pipe, and a terminal with Ctrl-C and Ctrl-D."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stages.chat import chat
from tests.support.serving import environment, run

Chatted = Callable[..., Any]


@pytest.fixture
def chatted(in_models_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Chatted:
    """What is printed, `out` and `err`, when these lines come from a pipe."""

    def talk(*lines: str, **choice: Any) -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        chat(Path("merged"), overrides=["generate.max_tokens=10", "generate.presence_penalty=2"], **choice)
        return capsys.readouterr()

    return talk


def test_each_line_of_a_pipe_is_answered_and_nothing_else_is_printed(in_models_folder: Path) -> None:
    options = ("--set", "generate.max_tokens=10", "--set", "generate.presence_penalty=2")
    done = run(in_models_folder, "chat", "merged", *options, typed="one\n\ntwo\none\n")
    first, _, third = done.stdout.splitlines()
    assert done.stderr == "" and "\x1b" not in done.stdout
    assert first != third  # it remembers
    assert run(in_models_folder, "generate", "merged", *options, "--prompt", "one").stdout.strip() == first


def test_a_cleared_conversation_starts_anew(chatted: Chatted) -> None:
    first, _, again = chatted("one", "two", "/clear", "one").out.splitlines()
    assert first == again


def test_models_are_switched_by_name_or_folder(chatted: Chatted) -> None:
    lines = ("q", "/base", "/adapter two", "/clear", "q", "/base", "/adapter base", "/clear", "q", "/adapter")
    done = chatted(*lines, adapters=["one"])
    one, base, two, base_again, alone, names = done.out.splitlines()
    assert base == base_again == alone
    assert len({one, base, two}) == 3
    assert names == "[base]  one  two"
    assert re.search(r"^two answers from now on \([\d.]+ ms\)$", done.err, re.MULTILINE)
    assert chatted("q", adapters=["two"]).out.strip() == two


def test_the_merged_model_is_loaded_beside_the_base_when_it_is_asked(chatted: Chatted) -> None:
    lines = ("/adapter", "/merged", "q", "/base", "/adapter", "/adapter two", "/clear", "q", "/merged", "/clear", "q")
    before, merged, base, names, two, merged_again = chatted(*lines, adapters=["one"]).out.splitlines()
    assert (before, names) == ("base  [one]", "base  one  [merged]")
    assert merged == merged_again == chatted("q").out.strip()
    assert base == chatted("q", base=True).out.strip()
    assert two == chatted("q", adapters=["two"]).out.strip()
    assert len({merged, base, two}) == 3
    assert chatted("q", "/merged", "/clear", "q").out.splitlines() == [merged, merged]


def test_a_merged_model_that_is_not_there_is_one_line(chatted: Chatted, in_models_folder: Path) -> None:
    there = in_models_folder / "merged"
    there.rename(in_models_folder / "elsewhere")
    try:
        done = chatted("/merged", "q", adapters=["one"])
    finally:
        (in_models_folder / "elsewhere").rename(there)
    assert done.err.splitlines()[0] == "warning: merged: no merged model; make it with: python -m stages.merge"
    assert done.out.strip() == chatted("q", adapters=["one"]).out.strip()


def test_mistakes_are_one_line_and_the_conversation_goes_on(chatted: Chatted) -> None:
    done = chatted("/nonsense", "/base", "/adapter nowhere", "q")
    assert len(done.out.splitlines()) == 1
    warnings = done.err.splitlines()
    assert [line.startswith("warning: ") for line in warnings] == [True] * 3
    assert "/help lists them" in warnings[0] and "--adapter" in warnings[1] and "--base" in warnings[2]


def test_help_names_every_command(chatted: Chatted) -> None:
    shown = chatted("/help", "/quit", "never asked").out
    assert all(name in shown for name in ("/base", "/merged", "/adapter", "/clear", "/help", "/quit"))
    assert len(shown.splitlines()) == 6


@contextmanager
def terminal(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The command on a terminal of its own."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "stages", "chat", *arguments],
        cwd=folder, env=environment(folder, TERM="dumb"), stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def until(ours: int, wanted: str, key: bytes = b"", seconds: float = 60) -> str:
    """What the terminal shows, up to and with the wanted text; a key is pressed until it is heard."""
    shown, began, pressed = "", time.monotonic(), 0
    while wanted not in shown:
        assert time.monotonic() < began + seconds, shown
        if key and time.monotonic() >= began + 3 * pressed:
            os.write(ours, key)
            pressed += 1
        if select.select([ours], [], [], 0.2)[0]:
            shown += os.read(ours, 4096).decode(errors="replace")
    return shown


def test_on_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(in_models_folder: Path) -> None:
    arguments = ("merged", "--set", "generate.max_tokens=480", "--set", "generate.presence_penalty=2")
    with terminal(in_models_folder, *arguments) as (process, ours):
        assert "merged answers; /help" in until(ours, "> ")
        os.write(ours, b"q\n")
        until(ours, "q\r\n")
        os.read(ours, 1)
        assert len(until(ours, "> ", key=b"\x03")) < 400
        assert "Ctrl-D leaves" in until(ours, "> ", key=b"\x03")
        os.write(ours, b"\x04")
        assert process.wait(timeout=20) == 0


def test_by_a_template_it_says_that_questions_stand_alone(in_models_folder: Path) -> None:
    with terminal(in_models_folder, "merged", "--set", 'prepare.template="Q: {question} A: {answer}"') as (
        process,
        ours,
    ):
        assert "each question is asked alone" in until(ours, "> ")
        os.write(ours, b"/quit\n")
        assert process.wait(timeout=20) == 0
