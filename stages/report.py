"""All that a run made, on one page that needs no network.

artifacts, data/tokens, data/prepared → artifacts/report/index.html: `python -m stages.report --out artifacts/report`
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from stages.base.manifest import read_manifest
from stages.cli import console
from stages.cli.versions import VERSIONS_FILE, read_versions
from stages.files import outputs
from stages.files.hashes import sha256
from stages.params.loading import load_params

_STAGES = ("prepare", "tokenize", "train", "merge", "evaluate")
_CURVES = ("loss", "valid_loss", "lengths")


def report(
    artifacts: Annotated[Path, typer.Option(help="The folder of what the stages made.")] = Path("artifacts"),
    data: Annotated[Path, typer.Option(help="The folder of prepared and tokens.")] = Path("data"),
    out: Annotated[Path, typer.Option(help="The folder to write index.html to.")] = Path("artifacts/report"),
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
) -> None:
    """Write scores with intervals, curves, answers side by side, the rows' ledger and the hashes of all files."""
    from stages.reporting.page import Run, page
    from stages.tables.parquet import read_table

    params = load_params(params_file, ()).model_dump(exclude={"runtime"})
    outputs.refuse_foreign(out, ["index.html"])
    evaluated = artifacts / "evaluate"
    base = read_manifest(artifacts / "base.json").identity
    rows, answers = (
        read_table(evaluated / f"{name}.parquet", (), base=base, made_by="evaluate") for name in ("rows", "answers")
    )
    run = Run(
        details={name: _read(artifacts / "details" / f"{name}.json", name) for name in _STAGES},
        rows=rows.to_pylist(),
        answers=answers.to_pylist(),
        samples=_samples(artifacts / "samples" / "samples.jsonl"),
        curves={name: _curve(artifacts / "plots" / f"{name}.csv") for name in _CURVES},
        base={"license": None} | _read(artifacts / "base.json", "fetch"),
        params=params,
        versions=read_versions(VERSIONS_FILE),
        hashes=_hashes(artifacts, data),
    )
    text = page(run)
    with outputs.replacing(out) as draft:
        draft.mkdir()
        (draft / "index.html").write_bytes(text.encode())
    console.say(f"{run.details['evaluate']['sentence']} → {out / 'index.html'}")


def _read(path: Path, stage: str) -> dict[str, Any]:
    return outputs.read_json(path, f"make it with: python -m stages.{stage}")


def _samples(path: Path) -> list[dict[str, str]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; make it with: python -m stages.generate") from None


def _curve(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file, numbers as numbers."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [{name: _number(value) for name, value in row.items()} for row in csv.DictReader(file)]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; make it with: python -m stages.train") from None


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _hashes(artifacts: Path, data: Path) -> dict[str, str]:
    """SHA-256 of every file that entered the run, and of every one that it made."""
    sources = _read(data / "prepared" / "sources.json", "prepare")["sources"]
    folders = [data / "prepared", data / "tokens"]
    folders += [artifacts / name for name in ("baseline", "adapter", "merged", "evaluate", "samples")]
    files = [artifacts / "base.json", *(path for folder in folders for path in sorted(folder.iterdir()))]
    with console.progress("hashing", total=len(files)) as advance:
        hashes = {name: str(source["sha256"]) for name, source in sources.items()}
        for path in files:
            hashes[path.as_posix()] = sha256(path)
            advance(1)
    return hashes


if __name__ == "__main__":
    console.main(report)
