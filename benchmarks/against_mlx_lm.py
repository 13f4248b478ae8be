"""Validation loss after N updates of mlx_lm.lora and of this project, side by side, with the same hyperparameters.

`python -m benchmarks.against_mlx_lm --data DIR`: DIR holds train.jsonl and valid.jsonl with rows of {"text": …}. Both
trainers run as commands in processes of their own, under the same BLAS, on the same rows and the same base in float32;
both adapters are scored alike, by `benchmarks.score`, on every token of the validation rows.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks import mlx_lm_peer
from benchmarks.ground import LORA, TRAINING, our_settings, write_float32_base
from benchmarks.processes import ROOT, overrides, run
from benchmarks.score import losses
from stages.base.manifest import read_manifest
from stages.cli import console
from stages.model import blas

if TYPE_CHECKING:
    from stages.tokens.row import TokenRow

MAX_LENGTH = 4096  # tokens a row; a longer one is an error, for the two trainers cut at different ends


@dataclass(frozen=True)
class Run:
    """One trainer's figures. `seconds` are the whole command's; the rate leaves loading and the first update out."""

    rows_seen: int
    seconds: float
    tokens_per_second: float
    adapter: Path


def against_mlx_lm(
    data: Annotated[Path, typer.Option(help="The folder with train.jsonl and valid.jsonl.")],
    updates: Annotated[int, typer.Option(min=2, help="Optimizer updates of each trainer.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="The seed of both.")] = 0,
    keep: Annotated[Path | None, typer.Option(help="Work in this new folder and leave it there.")] = None,
) -> None:
    """Train an adapter with mlx_lm.lora and one with this project's stages, and score both alike."""
    files = {name: data.resolve() / f"{name}.jsonl" for name in ("train", "valid")}
    if missing := [str(path) for path in files.values() if not path.is_file()]:
        raise ValueError(f"{', '.join(missing)}: no such file; --data names a folder with train.jsonl and valid.jsonl")
    blas.preload()
    if keep is not None:
        keep.mkdir(parents=True)
    with nullcontext(str(keep.resolve())) if keep else tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with console.progress("preparing"):
            model = write_float32_base(folder)
            projects = {name: make_project(folder / name, path, model, updates, seed) for name, path in files.items()}
            texts = {name: read_texts(project) for name, project in projects.items()}
            rows = {name: read_tokens(project) for name, project in projects.items()}
            for name in files:
                check_same_tokens(rows[name], texts[name], model)
        with console.progress("mlx_lm.lora"):
            runs = {"mlx_lm.lora": run_theirs(folder / "mlx_lm", texts["train"], model, updates, seed)}
        with console.progress("lorabuild"):
            runs["lorabuild"] = run_ours(projects["train"], len(rows["train"]))
        with console.progress("scoring"):
            untrained, *scores = losses(model, [found.adapter for found in runs.values()], rows["valid"])
        lines: list[tuple[Any, ...]] = [("untrained", 0, 0, "-", "-", *untrained)]
        for (trainer, found), score in zip(runs.items(), scores, strict=True):
            figures = (f"{found.seconds:.1f}", round(found.tokens_per_second))
            lines.append((trainer, updates, found.rows_seen, *figures, *score))
    about = f"{len(rows['train']):,} training rows, {len(rows['valid']):,} validation rows, seed {seed}"
    header = ("trainer", "updates", "rows seen", "seconds", "tokens/s", "valid loss", "no EOS")
    console.table(about, header, lines)


# --- the common ground


def make_project(folder: Path, rows: Path, model: Path, updates: int, seed: int) -> Path:
    """A project of its own around one file of rows, all of which go to its train split, up to token files."""
    raw = folder / "data" / "raw"
    raw.mkdir(parents=True)
    shutil.copyfile(rows, raw / "rows.jsonl")  # under a name that says nothing of splits
    shutil.copyfile(ROOT / "params.yaml", folder / "params.yaml")
    (folder / "set.json").write_text(json.dumps(settings(model, updates, seed)))
    for name in ("fetch", "prepare", "tokenize"):
        stage(folder, name)
    return folder


def settings(model: Path, updates: int, seed: int) -> dict[str, Any]:
    """For `--set`: all that bears on the result, whatever params.yaml holds."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"source": str(model), "revision": None},
        "prepare": {"dataset": None, "columns": {}, "group_by": None, "max_chars": None}
        | {"valid_fraction": 0.0, "valid_rows": None, "test_fraction": 0.0, "test_rows": None},
        "tokenize": {"max_length": MAX_LENGTH, "over_length": "error", "train_on": "all", "add_eos": True}
        | {"answer_marker": None, "chat_template": None},
    }
    ours = {f"{part}.{key}": value for part, keys in sections.items() for key, value in keys.items()}
    return ours | our_settings(lora=LORA, training=TRAINING | {"updates": updates}, seed=seed)


def read_texts(project: Path) -> list[str]:
    """The rows that prepare left, as text."""
    with (project / "data" / "prepared" / "train.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row["text"] if row.get("text") else row["prompt"] + row["completion"] for row in rows]


def read_tokens(project: Path) -> list[TokenRow]:
    from stages.tokens import parquet

    identity = read_manifest(project / "artifacts" / "base.json").tokenizer_identity
    return list(parquet.read_tokens(project / "data" / "tokens" / "train.parquet", tokenizer=identity))


def check_same_tokens(rows: Sequence[TokenRow], texts: Iterable[str], model: Path) -> None:
    """Raise ValueError unless both trainers were given the same tokens."""
    from mlx_lm.tuner.datasets import TextDataset
    from mlx_lm.utils import load_tokenizer

    theirs = TextDataset([], load_tokenizer(model))
    for row, text in zip(rows, texts, strict=True):
        ids, _ = theirs.process({"text": text})
        if row.input_ids.tolist() != ids:
            raise ValueError(f"{row.source}: mlx-lm makes other tokens of this row")


# --- the trainers


def run_ours(project: Path, rows: int) -> Run:
    seconds = stage(project, "train")
    artifacts = project / "artifacts"
    epochs = json.loads((artifacts / "details" / "train.json").read_text())["epochs"]
    timing = json.loads((artifacts / "timing" / "train.json").read_text())
    # An epoch trains on each row once.
    return Run(min(round(epochs * rows), rows), seconds, timing["tokens_per_second"], artifacts / "adapter")


def run_theirs(folder: Path, texts: Sequence[str], model: Path, updates: int, seed: int) -> Run:
    folder.mkdir()
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    config, spec, record = folder / "config.json", folder / "spec.json", folder / "record.json"
    spec.write_text(json.dumps({"blas": True}))
    training = TRAINING | {"updates": updates, "max_length": MAX_LENGTH}
    content = mlx_lm_peer.settings(
        model=model, data=folder, adapter=folder / "adapter", lora=LORA, training=training, seed=seed
    )
    config.write_text(json.dumps(content))
    done = run(
        ["-m", "benchmarks.mlx_lm_peer", str(spec), str(record), "lora", "--config", str(config)],
        folder=folder,
        log=folder / "train.log",
        store=folder.parent / "store",
    )
    found = json.loads(record.read_text())
    rate = sum(found["tokens"][1:]) / sum(found["seconds"][1:])
    # Its epochs are of full batches, always the same ones.
    size = training["batch_size"]
    return Run(min(updates * size, len(texts) // size * size), done.seconds, rate, folder / "adapter")


def stage(project: Path, name: str) -> float:
    """Run one of this project's stages in a project folder, all paths at their defaults; how long it took."""
    arguments = ["-m", f"stages.{name}", *overrides(json.loads((project / "set.json").read_text()))]
    # The store is not the user's: the float32 base does not stay.
    return run(arguments, folder=project, log=project / f"{name}.log", store=project.parent / "store").seconds


if __name__ == "__main__":
    console.main(against_mlx_lm)
