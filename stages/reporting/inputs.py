"""The files of a run: read for the report, and hashed, each under the stage that makes it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.base.manifest import read_manifest
from stages.files.hashes import sha256
from stages.files.outputs import read_json
from stages.tables.parquet import read_table

# What each stage writes. `artifacts` and `data` stand for the folders that the report is asked about.
MADE = {
    "fetch": ("artifacts/base.json",),
    "prepare": ("data/prepared", "artifacts/details/prepare.json", "artifacts/metrics/prepare.json"),
    "tokenize": (
        "data/tokens", "artifacts/details/tokenize.json", "artifacts/metrics/tokenize.json",
        "artifacts/plots/lengths.csv",
    ),
    "baseline": ("artifacts/baseline",),
    "train": (
        "artifacts/adapter", "artifacts/details/train.json", "artifacts/metrics/train.json",
        "artifacts/plots/loss.csv", "artifacts/plots/valid_loss.csv",
    ),
    "merge": ("artifacts/merged", "artifacts/details/merge.json"),
    "evaluate": ("artifacts/evaluate", "artifacts/details/evaluate.json", "artifacts/metrics/evaluate.json"),
    "generate": ("artifacts/samples",),
}  # fmt: skip
# What goes into the DAG beside data/raw, whose hashes prepare keeps. One is missing where a stage had another.
GIVEN = ("data/prompts.jsonl", "data/general.jsonl")
# A key that each stage's numbers have: without it they are of another version of the project.
_KEYS = {"prepare": "all", "tokenize": "all", "train": "steps", "merge": "survival", "evaluate": "sentence"}


@dataclass(frozen=True)
class File:
    """A file's name in the project, its size in bytes (unknown of raw data) and its hash."""

    name: str
    size: int | None
    sha256: str


@dataclass(frozen=True)
class Run:
    """A run as read from its files. `details` and `files` are by stage; files of no stage are under `given`."""

    details: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    answers: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, str]]
    losses: Sequence[tuple[int, float]]  # (step, loss), in training
    valid_losses: Sequence[tuple[int, float]]
    lengths: Sequence[tuple[int, str, int]]  # (longest length of the bin, split, rows)
    sources: Mapping[str, Any]
    base: Mapping[str, Any]
    files: Mapping[str, Sequence[File]]
    params: Mapping[str, Any]
    versions: Mapping[str, str]


class Project:
    """The folders of a run's files."""

    def __init__(self, artifacts: Path, data: Path) -> None:
        self._folders = {"artifacts": artifacts, "data": data}

    def path(self, name: str) -> Path:
        """Where a file of a run lies: the first part of its name stands for a folder."""
        top, _, rest = name.partition("/")
        return self._folders[top] / rest

    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.path(name).stat().st_size for _, name in self.files())

    def files(self) -> Iterator[tuple[str, str]]:
        """Stage and name of each file that the stages made, and of those that they were given.

        Raises:
            ValueError: something is missing; the message says which stage makes it.
        """
        for name in GIVEN:
            if self.path(name).exists():
                yield "given", name
        for stage, names in MADE.items():
            for name in names:
                path = self.path(name)
                inner = sorted(path.rglob("*")) if path.is_dir() else [path]
                found = [file for file in inner if file.is_file()]
                if not found:
                    raise ValueError(f"{path}: {_remedy(stage, missing=True)}")
                for file in found:
                    yield stage, (Path(name) / file.relative_to(path)).as_posix()


def read_run(
    project: Project,
    *,
    params: Mapping[str, Any],
    versions: Mapping[str, str],
    advance: Callable[[int], None] = lambda count: None,
) -> Run:
    """Read and hash a run's files; `advance` hears of the bytes hashed.

    Raises:
        ValueError: a file is missing or damaged; the message says which stage makes it.
    """
    files = list(project.files())
    base_file = project.path("artifacts/base.json")
    base = read_manifest(base_file).identity
    rows, answers = (
        read_table(project.path(f"artifacts/evaluate/{name}.parquet"), columns, base=base, made_by="evaluate")
        for name, columns in {
            "rows": ("id", "tokens", "base_loss", "adapter_loss"),
            "answers": ("id", "source", "prompt", "reference", "base", "tuned", "base_chrf", "tuned_chrf"),
        }.items()
    )
    sources = _read_object(project.path("data/prepared/sources.json"), "prepare", "sources")
    hashed: dict[str, list[File]] = {
        "given": [File(name, None, source["sha256"]) for name, source in sources["sources"].items()]
    }
    for stage, name in files:
        path = project.path(name)
        hashed.setdefault(stage, []).append(File(name, path.stat().st_size, sha256(path, advance)))
    return Run(
        details={
            stage: _read_object(project.path(f"artifacts/details/{stage}.json"), stage, key)
            for stage, key in _KEYS.items()
        },
        rows=rows.to_pylist(),
        answers=answers.to_pylist(),
        samples=list(_samples(project.path("artifacts/samples/samples.jsonl"))),
        losses=list(_columns(project.path("artifacts/plots/loss.csv"), "train", step=int, loss=float)),
        valid_losses=list(
            _columns(project.path("artifacts/plots/valid_loss.csv"), "train", step=int, valid_loss=float)
        ),
        lengths=list(
            _columns(project.path("artifacts/plots/lengths.csv"), "tokenize", length=int, split=str, rows=int)
        ),
        sources=sources["sources"],
        base=_read_object(base_file, "fetch", "source"),
        files=hashed,
        params=params,
        versions=versions,
    )


def _remedy(stage: str, *, missing: bool = False) -> str:
    return f"{'no such file; make it' if missing else 'make it anew'} with: python -m stages.{stage}"


def _read_object(path: Path, stage: str, key: str) -> dict[str, Any]:
    content = read_json(path, _remedy(stage))
    if key not in content:
        raise ValueError(f"{path}: not what {stage} writes; {_remedy(stage)}")
    return content


def _samples(path: Path) -> Iterator[dict[str, str]]:
    for number, line in enumerate(_lines(path, "generate"), start=1):
        try:
            sample = json.loads(line)
            # Prompts that generate read from another file have no answer of the base model.
            yield {name: str(sample[name]) for name in ("prompt", "base", "merged") if name != "base" or name in sample}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path}:{number}: damaged: not a sample; {_remedy('generate')}") from None


def _columns(path: Path, stage: str, **kinds: Callable[[str], Any]) -> Iterator[tuple[Any, ...]]:
    """Some columns of a CSV file, each value made by its column's function."""
    for number, row in enumerate(csv.DictReader(_lines(path, stage)), start=2):
        try:
            yield tuple(kind(row[name]) for name, kind in kinds.items())
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}:{number}: damaged; {_remedy(stage)}") from None


def _lines(path: Path, stage: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        raise ValueError(f"{path}: {_remedy(stage, missing=True)}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: damaged: not UTF-8; {_remedy(stage)}") from None
