"""The options of commands that ask a model: which one, and how its tokens are chosen."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

_ANSWER = "The answer (each overrides its namesake in section `generate` of the parameters)"


def _option(what: str, **more: Any) -> Any:
    return typer.Option(help=what, show_default=False, rich_help_panel=_ANSWER, **more)


Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="[NAME=]DIR",
        help="Instead of the merged model, the base model with this adapter; may be repeated.",
        show_default=False,
    ),
]
Base = Annotated[bool, typer.Option("--base", help="Instead of the merged model, the base model alone.")]

MaxTokens = Annotated[int | None, _option("Of an answer, at most.")]
Temperature = Annotated[float | None, _option("0: the likeliest token each time.")]
TopP = Annotated[float | None, _option("From the likeliest tokens that together have this probability.")]
TopK = Annotated[int | None, _option("From so many of the likeliest tokens; 0: from all.")]
MinP = Annotated[float | None, _option("From tokens with this share of the likeliest one's probability.")]
RepetitionPenalty = Annotated[float | None, _option("Above 1: what came lately becomes less likely.")]
PresencePenalty = Annotated[float | None, _option("Taken from the logits of tokens that came lately.")]
FrequencyPenalty = Annotated[float | None, _option("The same, for each time that they came.")]
Stop = Annotated[list[str] | None, _option("End the answer before this string; may be repeated.", metavar="TEXT")]
Seed = Annotated[int | None, _option("Chooses the tokens where the temperature is not 0.")]


def overrides(**options: Any) -> list[str]:
    """Those options that are given, as overrides of the parameters."""
    return [f"generate.{name}={json.dumps(value)}" for name, value in options.items() if value is not None]


def standard_input() -> str:
    """All of standard input, without the last line's end.

    Raises:
        ValueError: it is no text, or none.
    """
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 (byte {error.start})") from None
    if not text.strip():
        raise ValueError("standard input is empty: the prompt is expected there")
    return text.removesuffix("\n").removesuffix("\r")
