"""Talk with the merged model, or with the base model and adapters, in the terminal.

artifacts/merged → answers: `python -m stages chat`, `python -m stages chat --adapter artifacts/adapter`
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated

import typer

from stages.cli import asking, console
from stages.cli.settings import load_settings

if TYPE_CHECKING:
    from stages.serving.conversation import Conversation
    from stages.serving.models import Models

HELP = """\
/base            what the base model answers to the last question
/merged          go on with the merged model, loaded beside the base when first asked
/adapter NAME    go on with this model; a folder is loaded as an adapter; without a name: which there are
/clear           start anew
/help            these lines
/quit            leave, as Ctrl-D does; Ctrl-C stops an answer"""


def chat(
    merged: Annotated[Path, typer.Argument(help="The model directory that merge wrote.")] = Path("artifacts/merged"),
    manifest: Annotated[Path, typer.Option(help="The base model's manifest.")] = Path("artifacts/base.json"),
    adapters: asking.Adapters = None,
    base: asking.Base = False,
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """Ask and be answered, line by line. /help lists what else can be typed.

    Questions are rendered as training rendered them: a conversation by the chat template, or each question alone by
    prepare.template. Without a terminal, each line of standard input is answered.
    """
    settings = load_settings(params_file, overrides)
    from stages.serving.conversation import Conversation
    from stages.serving.models import open_models

    with console.progress("loading the model"):
        models = open_models(settings, merged=merged, manifest=manifest, base=base, adapters=adapters or ())
        if adapters and not base:
            models.switch(models.names[1])
    if sys.stdin.isatty():
        console.note(f"{models.name} answers; /help lists commands, Ctrl-D leaves")
        if models.prompts.by_template:
            console.note("each question is asked alone, by prepare.template: it knows nothing of those before")
    conversation = Conversation(models, settings.generate)
    for line in _lines():
        if line == "/quit":
            return
        try:
            _obey(line, conversation, models)
        except ValueError as error:
            console.warn(str(error))


def _lines() -> Iterator[str]:
    """What the user types, without white space at its ends; empty lines are passed over."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives `input` its line editing and history
    while True:
        try:
            line = (input("> ") if is_terminal else next(sys.stdin)).strip()
        except (EOFError, StopIteration):
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            console.note("Ctrl-D leaves")
            continue
        if line:
            yield line


def _obey(line: str, conversation: Conversation, models: Models) -> None:
    """Do what a line says: a command, or a question to answer."""
    command, _, name = line.partition(" ")
    if not line.startswith("/"):
        with _interruptible() as stop:
            _show(conversation.ask(line, stopped=stop.is_set))
    elif command == "/base":
        if models.names[0] != "base":
            raise ValueError("the merged model holds no base model: start with --adapter artifacts/adapter")
        with _interruptible() as stop:
            _show(conversation.ask_again(models.names[0], stopped=stop.is_set))
    elif command == "/merged":
        with console.progress("loading the merged model"):
            models.add_merged()
        _switch("merged", models)
    elif command == "/adapter":
        _switch(name.strip(), models)
    elif command == "/clear":
        conversation.clear()
    elif command == "/help":
        console.say(HELP)
    else:
        raise ValueError(f"{command}: no such command; /help lists them")


def _switch(name: str, models: Models) -> None:
    """Go on with another model; an adapter's folder is loaded first."""
    from stages.serving.models import adapter_folders

    if not name:
        console.say("  ".join(f"[{each}]" if each == models.name else each for each in models.names))
        return
    began = time.perf_counter()
    if name not in models.names:
        [(name, folder)] = adapter_folders([name]).items()
        models.add(name, folder)
    models.switch(name)
    console.note(f"{name} answers from now on ({1000 * (time.perf_counter() - began):.1f} ms)")


def _show(pieces: Iterator[str]) -> None:
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()


@contextlib.contextmanager
def _interruptible() -> Iterator[Event]:
    """On a terminal the first Ctrl-C sets the event that this yields, a second one interrupts as elsewhere."""
    stop = Event()

    def note(_: int, __: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    before = signal.getsignal(signal.SIGINT)
    if sys.stdin.isatty():
        signal.signal(signal.SIGINT, note)
    try:
        yield stop
    except KeyboardInterrupt:
        if not stop.is_set():
            raise
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    console.main(chat)
