"""One row of a token file as training sees it, trained tokens coloured:
`python -m stages inspect data/tokens/train.parquet --row 3`
"""

from __future__ import annotations

import random as randomness
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from stages.base.manifest import locate, read_manifest
from stages.cli import console
from stages.params.loading import load_params

if TYPE_CHECKING:
    from stages.tokens.row import TokenRow

_TRAINED, _CONTEXT = ("black on green", "black on bright_green"), ("dim", "dim italic")
# Control characters would drive the terminal: their pictures stand for them.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}


def inspect(
    tokens: Annotated[Path, typer.Argument(help="A file that tokenize wrote.")] = Path("data/tokens/train.parquet"),
    row: Annotated[int, typer.Option(min=0, help="The row, counted from 0.")] = 0,
    longest: Annotated[bool, typer.Option("--longest", help="The longest row.")] = False,
    random: Annotated[bool, typer.Option("--random", help="Any row, another one each time.")] = False,
    base_file: console.ManifestFile = Path("artifacts/base.json"),
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """Print a row's tokens: coloured is what the model learns to produce, dim is what it only reads.

    Neighbouring tokens differ in shade. Where colours are not shown (a file, a pipe), «…» surrounds what is learned.
    """
    from stages.templating.tokenizer import load_tokenizer
    from stages.tokens.parquet import read_lengths, read_metadata, read_row

    trust = load_params(params_file, overrides or ()).model.trust_remote_code
    about, lengths = read_metadata(tokens), read_lengths(tokens)
    if longest:
        row = int(lengths.argmax()) if len(lengths) else 0
    elif random:
        row = randomness.SystemRandom().randrange(max(len(lengths), 1))
    chosen = read_row(tokens, row)
    manifest = read_manifest(base_file)
    if about["tokenizer"] != manifest.tokenizer_identity:
        raise ValueError(f"{tokens}: made with another base model's tokenizer; run: python -m stages.tokenize")
    tokenizer = load_tokenizer(locate(manifest), trust_remote_code=trust)
    policy = about.get("policy")
    if not isinstance(policy, dict):
        raise ValueError(f"{tokens}: its metadata is damaged; make it anew with: python -m stages.tokenize")
    console.say(f"Row {row} of {len(lengths):,}, id {chosen.id}, from {chosen.source}")
    console.out.print(_shown(chosen, tokenizer, coloured=console.out.is_terminal), soft_wrap=True)
    trained = int(chosen.loss_mask.sum())
    spelled = _spelled(chosen, tokenizer)
    console.table(
        "What the model learns from it",
        ("", "value"),
        [
            ("tokens", len(chosen.input_ids)),
            ("trained tokens", f"{trained:,} ({trained / len(chosen.input_ids):.0%})"),
            ("max_length", policy["max_length"]),
            ("cut to fit", "yes" if chosen.truncated else "no"),
            ("longer rows in the file", int((lengths > len(chosen.input_ids)).sum())),
            ("train_on", policy["train_on"]),
            *([("control tokens that are only text", spelled)] if spelled else []),
        ],
    )


def _shown(row: TokenRow, tokenizer: Any, *, coloured: bool) -> Text:
    """The row's text, piece by piece: a piece is as many tokens as it takes to make whole characters."""
    shown, shade, before = Text(), 0, False
    for ids, trained in pieces(row, tokenizer):
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).translate(_PICTURES)
        if coloured:
            styles = _TRAINED if trained else _CONTEXT
            shown.append(text, styles[shade % 2])
        else:
            shown.append(("«" if trained else "»") * (trained is not before) + text)
        shade, before = shade + 1, trained
    if before and not coloured:
        shown.append("»")
    return shown


def _spelled(row: TokenRow, tokenizer: Any) -> int:
    """Count the control tokens that the row's text only spells: on the screen they look like real ones."""
    from stages.templating.tokenizer import TextTokenizer

    control = TextTokenizer(tokenizer).control
    text = tokenizer.decode(row.input_ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return len(control.pattern.findall(text)) - control.count(row.input_ids.tolist())


def pieces(row: TokenRow, tokenizer: Any) -> list[tuple[list[int], bool]]:
    """Runs of tokens that are whole characters together, all trained or none."""
    made: list[tuple[list[int], bool]] = []
    open_piece = False
    for index, on in zip(row.input_ids.tolist(), row.loss_mask.tolist(), strict=True):
        if open_piece and made[-1][1] == on:
            made[-1][0].append(index)
        else:
            made.append(([index], on))
        open_piece = "\N{REPLACEMENT CHARACTER}" in tokenizer.decode(made[-1][0], skip_special_tokens=False)
    return made


if __name__ == "__main__":
    console.main(inspect)
