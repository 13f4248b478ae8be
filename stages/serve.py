"""Serve the merged model, or the base model with adapters, as OpenAI's API on this machine.

artifacts/merged → http://127.0.0.1:8080/v1: `python -m stages serve`
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from threading import Event, Thread
from typing import Annotated, NoReturn

import typer

from stages.cli import asking, console
from stages.cli.settings import load_settings

KEY_VARIABLE = "LORABUILD_API_KEY"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_LOOK_SECONDS = 0.1


def serve(
    merged: Annotated[Path, typer.Argument(help="The model directory that merge wrote.")] = Path("artifacts/merged"),
    manifest: Annotated[Path, typer.Option(help="The base model's manifest.")] = Path("artifacts/base.json"),
    adapters: asking.Adapters = None,
    base: asking.Base = False,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0: every one of this machine.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0: any free one.")] = 8080,
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """Answer /v1/chat/completions and /v1/completions, streaming or not, until Ctrl-C.

    Requests name one of the models at /v1/models. What a request leaves open, the section `generate` of params.yaml
    says. With LORABUILD_API_KEY in the environment, clients must send that key.
    """
    settings = load_settings(params_file, overrides)
    from stages.serving.generation import Provider
    from stages.serving.models import open_models
    from stages.serving.server import Server

    key = os.environ.get(KEY_VARIABLE) or None
    os.environ["HF_HUB_OFFLINE"] = "1"
    asked_to_stop = _stop_requests()
    provider = Provider(
        lambda: open_models(settings, merged=merged, manifest=manifest, base=base, adapters=adapters or ())
    )
    try:
        server = Server(host, port, provider, settings.generate, key)
    except OSError as error:
        raise ValueError(f"{host}:{port}: {error.strerror}; choose another with --host and --port") from None
    with console.progress("loading the models"):
        _until(provider.ready, asked_to_stop)
    if isinstance(provider.failure, ValueError | OSError):
        console.show_error(provider.failure)
        _leave(1)
    if provider.failure is not None:
        raise provider.failure
    Thread(target=server.serve_forever, daemon=True).start()
    names = ", ".join(provider.models.names)
    console.say(f"http://{_shown(host)}:{server.server_port}/v1 serves {names}; Ctrl-C stops it")
    if provider.models.prompts.by_template:
        console.say("of each conversation the last question alone is asked, by prepare.template")
    if host not in _LOOPBACK and key is None:
        console.warn(f"{host} can be reached from other machines, without a key: set {KEY_VARIABLE}")
    _until(server.generation.dead, asked_to_stop)
    console.show_error(ValueError("the model no longer answers: see above; start the server again"))
    _leave(1)


def _stop_requests() -> list[int]:
    """The signals that ask this process to stop, as they come."""
    received: list[int] = []
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda number, _: received.append(number))
    return received


def _until(event: Event, asked_to_stop: list[int]) -> None:
    """Wait for the event. A request to stop ends the process: 130 after Ctrl-C, 0 after SIGTERM."""
    while not event.wait(_LOOK_SECONDS):
        if asked_to_stop:
            _leave(130 if asked_to_stop[0] == signal.SIGINT else 0)


def _leave(status: int) -> NoReturn:
    """End the process at once: an answer in the making is given up."""
    # MLX still clears up after the generation thread when Python ends, and the two together abort the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


if __name__ == "__main__":
    console.main(serve)
