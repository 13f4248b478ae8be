"""Prompts and completions → token ids and loss masks, as Parquet.

data/prepared + artifacts/base.json → data/tokens/{train,valid,test}.parquet:
`python -m stages.tokenize data/prepared --out data/tokens`
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from stages import base, console, files, params
from stages.text.split import SPLITS
from stages.text.tokens import PreparedRow, TokenRow, encode, load_tokenizer


def tokenize(
    prepared: Annotated[Path, typer.Argument(help="The folder that prepare wrote.")] = Path("data/prepared"),
    base_file: Annotated[Path, typer.Option("--base", help="The base model's manifest.")] = Path("artifacts/base.json"),
    out: Annotated[Path, typer.Option(help="The folder to write Parquet files to.")] = Path("data/tokens"),
    metrics: Annotated[Path, typer.Option(help="The ledger to write.")] = Path("artifacts/metrics/tokenize.json"),
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """Encode each row with the base model's tokenizer, EOS at its end, and mark the tokens that training scores."""
    from stages.text.parquet import write_tokens

    settings = params.load(params_file, overrides or ())
    manifest = base.read(base_file)
    tokenizer = load_tokenizer(base.locate(manifest), trust_remote_code=settings.model.trust_remote_code)
    metadata = {"tokenizer": manifest.tokenizer_identity, **settings.tokenize.model_dump()}
    ledger: dict[str, dict[str, Any]] = {}
    with files.replacing(out) as draft:
        draft.mkdir()
        for name in SPLITS:
            rows = _read(prepared / f"{name}.jsonl")
            ledger[name] = {"rows": 0, "truncated": 0, "tokens": 0, "trained_tokens": 0, "longest": 0}
            with console.progress(f"tokenizing {name}", total=len(rows)) as advance:
                encoded = encode(rows, tokenizer, **settings.tokenize.model_dump())
                write_tokens(draft / f"{name}.parquet", _counted(encoded, ledger[name], advance), metadata)
    files.write_json(metrics, ledger)
    console.table(
        f"Tokens → {out}",
        ("", *SPLITS),
        ((key.replace("_", " "), *(ledger[name][key] for name in SPLITS)) for key in ledger["train"]),
    )


def _read(path: Path) -> list[PreparedRow]:
    try:
        with path.open(encoding="utf-8") as file:
            return [PreparedRow(**json.loads(line)) for line in file]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; make it with: python -m stages.prepare") from None
    except (json.JSONDecodeError, TypeError, UnicodeDecodeError):
        raise ValueError(f"{path}: not written by prepare; make it anew with: python -m stages.prepare") from None


def _counted(rows: Iterable[TokenRow], ledger: dict[str, int], advance: Any) -> Iterator[TokenRow]:
    """The rows as they are, counted on their way."""
    for row in rows:
        ledger["rows"] += 1
        ledger["truncated"] += row.truncated
        ledger["tokens"] += len(row.input_ids)
        ledger["trained_tokens"] += int(row.loss_mask.sum())
        ledger["longest"] = max(ledger["longest"], len(row.input_ids))
        advance(1)
        yield row


if __name__ == "__main__":
    console.main(tokenize)
