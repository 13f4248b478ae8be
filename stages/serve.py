"""Serve the merged model, or the base model with adapters, as OpenAI's API on this machine.

artifacts/merged → http://127.0.0.1:8080/v1: `python -m stages serve`
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from threading import Event
from typing import Annotated

import typer

from stages.cli import console
from stages.params.loading import load_params

KEY_VARIABLE = "LORABUILD_API_KEY"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_LOOK_SECONDS = 1.0


def serve(
    merged: Annotated[Path, typer.Argument(help="The model directory that merge wrote.")] = Path("artifacts/merged"),
    base: Annotated[bool, typer.Option("--base", help="Serve the base model instead.")] = False,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="[NAME=]DIR",
            help="Serve the base model and this adapter instead, each by its name; may be repeated.",
            show_default=False,
        ),
    ] = None,
    manifest: Annotated[Path, typer.Option(help="The base model's manifest.")] = Path("artifacts/base.json"),
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
    from stages.serving.generation import Provider
    from stages.serving.models import open_models
    from stages.serving.server import Server

    settings = load_params(params_file, overrides or ())
    key = os.environ.get(KEY_VARIABLE) or None
    os.environ["HF_HUB_OFFLINE"] = "1"
    received: list[int] = []
    asked_to_stop = Event()

    def note(number: int, _: object) -> None:
        received.append(number)
        asked_to_stop.set()

    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, note)
    provider = Provider(
        lambda: open_models(settings, merged=merged, manifest=manifest, base=base, adapters=adapters or ())
    )
    try:
        server = Server(host, port, provider, settings.generate, key)
    except OSError as error:
        raise ValueError(f"{host}:{port}: {error.strerror}; choose another with --host and --port") from None
    with console.progress("loading the models"):
        server.start()
    names = ", ".join(provider.models.names)
    console.say(f"http://{_shown(host)}:{server.server_address[1]}/v1 serves {names}; Ctrl-C stops it")
    if provider.models.prompts.by_template:
        console.say("of each conversation the last question alone is asked, by prepare.template")
    if host not in _LOOPBACK and key is None:
        console.warn(f"{host} can be reached from other machines, without a key: set {KEY_VARIABLE}")
    while not asked_to_stop.wait(_LOOK_SECONDS):
        if not server.generation.is_healthy:
            raise ValueError("the model no longer answers: see above; start the server again")
    ended = server.stop()
    status = 130 if received[0] == signal.SIGINT else 0
    if not ended:
        # A long prompt is being read, which nothing can interrupt.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise typer.Exit(status)


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


if __name__ == "__main__":
    console.main(serve)
