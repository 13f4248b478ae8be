"""Prepared rows → token ids and loss masks, as Parquet.

data/prepared + artifacts/base.json → data/tokens/{train,valid,test}.parquet:
`python -m stages.tokenize data/prepared --out data/tokens`
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages.base.manifest import Manifest, check_token_id, locate, read_manifest
from stages.cli import console
from stages.files import outputs
from stages.params import schema
from stages.params.loading import load_params
from stages.prepared.row import read_prepared
from stages.prepared.splits import SPLITS
from stages.templating.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from stages.encoding.encoder import Encoded, Encoder
    from stages.encoding.lengths import Tally
    from stages.tokens.row import TokenRow

_COLUMNS = (*SPLITS, "all")


def tokenize(
    prepared: Annotated[Path, typer.Argument(help="The folder that prepare wrote.")] = Path("data/prepared"),
    base_file: console.ManifestFile = Path("artifacts/base.json"),
    out: Annotated[Path, typer.Option(help="The folder to write Parquet files to.")] = Path("data/tokens"),
    metrics: Annotated[Path, typer.Option(help="The headline numbers to write.")] = Path(
        "artifacts/metrics/tokenize.json"
    ),
    details: Annotated[Path, typer.Option(help="The ledger to write.")] = Path("artifacts/details/tokenize.json"),
    plot: Annotated[Path, typer.Option(help="The histogram of lengths to write.")] = Path(
        "artifacts/plots/lengths.csv"
    ),
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """Encode each row with the base model's tokenizer; mark the tokens that training scores: answers with their ends.

    Look at the result with `python -m stages inspect data/tokens/train.parquet --row 3`.
    """
    from stages.encoding.encoder import Encoder
    from stages.encoding.lengths import Tally, fallback_ids
    from stages.tokens.parquet import write_tokens

    settings = load_params(params_file, overrides or ())
    options = settings.tokenize
    outputs.refuse_foreign(out, [f"{name}.parquet" for name in SPLITS], inputs=[prepared])
    manifest = read_manifest(base_file)
    tokenizer = load_tokenizer(locate(manifest), trust_remote_code=settings.model.trust_remote_code)
    encoder = Encoder(tokenizer, options)
    tally = Tally(fallback_ids(encoder.backend))
    made_of = _sources(prepared)
    # What nobody reads of a source shapes no token: a column more to carry leaves the training rows as they are.
    sources = {
        name: {key: value for key, value in source.items() if key != "not_read"}
        for name, source in made_of["sources"].items()
    }
    about = {"tokenizer": manifest.tokenizer_identity, "policy": options.model_dump(), "sources": sources}
    started = time.perf_counter()
    with outputs.replacing(out) as draft:
        draft.mkdir()
        for name in SPLITS:
            total = made_of["rows"].get(name)
            with console.progress(f"tokenizing {name}", total=total, unit="rows") as advance:
                encoded = encoder.encode(read_prepared(prepared / f"{name}.jsonl", labels=name == "test"))
                rows = _counted(encoded, partial(tally.count, name), options, advance)
                rows = _embeddable(rows, manifest, encoder.backend.get_vocab_size())
                write_tokens(draft / f"{name}.parquet", rows, partial(_about, about, encoder, tally, name))
            _refuse_empty(name, tally.figures(name))
        figures = {name: tally.figures(name) for name in _COLUMNS}
    total = figures["all"]
    outputs.write_json(details, figures)
    outputs.write_json(metrics, {"dropped": total["rows_in"] - total["rows_used"], "tokens": total["trained_tokens"]})
    outputs.write_text(plot, "".join(["length,split,rows\n", *(f"{a},{b},{c}\n" for a, b, c in tally.histogram())]))
    _tell(
        figures, [*_notes(tally, figures["all"]), *tally.advice(options.max_length)], out, time.perf_counter() - started
    )


def _sources(prepared: Path) -> dict[str, Any]:
    """The sources that prepare read, and the number of rows of each split."""
    path, hint = prepared / "sources.json", "make it with: python -m stages.prepare"
    content = outputs.read_json(path, hint)
    if not content.keys() >= {"sources", "rows"}:
        raise ValueError(f"{path}: not written by prepare; {hint}")
    return content


def _about(about: dict[str, Any], encoder: Encoder, tally: Tally, name: str) -> dict[str, Any]:
    """The metadata of a split's file."""
    return {**about, "chat_template": encoder.template_hash, "ledger": tally.figures(name)}


def _counted(
    results: Iterator[Encoded], count: Callable[[Encoded], None], options: schema.Tokenize, advance: Any
) -> Iterator[TokenRow]:
    """The token rows, their making counted on the way.

    Raises:
        ValueError: a row that the parameters make an error.
    """
    for result in results:
        if (result.reason == "bad" and options.on_bad_row == "error") or (
            result.reason == "too_long" and options.over_length == "error"
        ):
            raise ValueError(result.message)
        count(result)
        advance(1)
        yield from result.rows


def _embeddable(rows: Iterator[TokenRow], manifest: Manifest, tokenizer_size: int) -> Iterator[TokenRow]:
    """The rows, as long as the base model's embedding has a row for each of their tokens.

    Raises:
        ValueError: a token that it has none for.
    """
    for row in rows:
        check_token_id(manifest, int(row.input_ids.max()), tokenizer_size=tokenizer_size, place=row.source)
        yield row


def _refuse_empty(name: str, figures: dict[str, Any]) -> None:
    if figures["rows_in"] and not figures["rows"]:
        reasons = ", ".join(f"{key} {count}" for key, count in figures.items() if key.startswith("dropped_") and count)
        raise ValueError(
            f"the {name} split has no row left of {figures['rows_in']} ({reasons}); see tokenize in params"
        )


def _notes(tally: Tally, total: dict[str, Any]) -> list[str]:
    """Lines on answers, thoughts and control tokens, if there is something to say."""
    notes = [tally.answers()]
    if count := total["thoughts_left_out"]:
        notes.append(f"{count:,} thoughts of earlier turns are left out by the chat template, as they will be in use")
    if count := total["special_in_content"]:
        notes.append(
            f"{count:,} rows spell control tokens: read as text; if they are meant as tokens, as in texts that a chat "
            "template made, set tokenize.special_in_content: allow"
        )
    return [note for note in notes if note]


def _tell(figures: dict[str, dict[str, Any]], notes: list[str], out: Path, seconds: float) -> None:
    total = figures["all"]
    rare = ("dropped_", "answers_", "thoughts_", "special_", "assistant_turns", "trained_answers")
    shown = [key for key in total if total[key] or not key.startswith(rare)]
    console.table(
        f"Tokens → {out}",
        ("", *_COLUMNS),
        ((key.replace("_", " "), *(figures[name][key] for name in _COLUMNS)) for key in shown),
    )
    dropped = total["rows_in"] - total["rows_used"]
    rates = f"{total['rows_in'] / seconds:,.0f} rows/s, {total['tokens'] / seconds:,.0f} tokens/s"
    console.say(f"{total['rows_in']:,} rows in = {total['rows_used']:,} used + {dropped:,} dropped; {rates}")
    for line in notes:
        console.say(line)


if __name__ == "__main__":
    console.main(tokenize)
