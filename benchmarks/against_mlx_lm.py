"""Validation loss after N updates of mlx_lm.lora and of this project, side by side, with the same hyperparameters.

`python -m benchmarks.against_mlx_lm --data DIR`: DIR holds train.jsonl and valid.jsonl with rows of {"text": …}. Both
trainers run as commands in processes of their own, under the same BLAS, on the same rows and the same base in float32;
both adapters are scored alike, by `stages.lora.loss`, on every token of the validation rows.
"""

from __future__ import annotations

import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages import base, blas, console

if TYPE_CHECKING:
    from stages.text.tokens import TokenRow

ROOT = Path(__file__).parent.parent

RANK, SCALE, LAYERS, MODULES = 8, 2.0, 8, ("q_proj", "v_proj")
BATCH_SIZE, LEARNING_RATE, BETAS, WEIGHT_DECAY = 4, 1e-4, [0.9, 0.999], 0.01
MAX_LENGTH = 4096  # tokens a row; a longer one is an error, for the two trainers cut at different ends

# Runs `theirs`, below, with the path to record to as its first argument.
THEIRS = "import sys; from pathlib import Path; from benchmarks.against_mlx_lm import theirs; theirs(Path(sys.argv[1]))"


@dataclass(frozen=True)
class Run:
    """What a trainer did. `seconds` are the whole command's; the rate leaves loading and the first update out."""

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
            lines: list[tuple[Any, ...]] = [("untrained", 0, 0, "-", "-", *losses(model, None, rows["valid"]))]
            for trainer, run in runs.items():
                figures = (f"{run.seconds:.1f}", round(run.tokens_per_second))
                lines.append((trainer, updates, run.rows_seen, *figures, *losses(model, run.adapter, rows["valid"])))
    about = f"{len(rows['train']):,} training rows, {len(rows['valid']):,} validation rows, seed {seed}"
    header = ("trainer", "updates", "rows seen", "seconds", "tokens/s", "valid loss", "no EOS")
    console.table(about, header, lines)


# --- the common ground


def write_float32_base(folder: Path) -> Path:
    """The base model of params.yaml, fetched where need be, with plain weights in float32."""
    from mlx_lm.utils import load_tokenizer, save

    from stages.lora.model import load_base

    manifest, out = folder / "base.json", folder / "float32"
    command(["-m", "stages.fetch", "--out", str(manifest)], folder=ROOT, log=folder / "fetch.log")
    directory = base.locate(base.read(manifest))
    model, config = load_base(directory, dtype="float32", dequantize=True)
    save(out, directory, model, load_tokenizer(directory), config)
    return out


def make_project(folder: Path, rows: Path, model: Path, updates: int, seed: int) -> Path:
    """A project of its own around one file of rows, all of which go to its train split, up to token files."""
    raw = folder / "data" / "raw"
    raw.mkdir(parents=True)
    shutil.copyfile(rows, raw / "rows.jsonl")  # under a name that says nothing of splits
    shutil.copyfile(ROOT / "params.yaml", folder / "params.yaml")
    (folder / "set.json").write_text(json.dumps(our_settings(model, updates, seed)))
    for name in ("fetch", "prepare", "tokenize"):
        stage(folder, name)
    return folder


def our_settings(model: Path, updates: int, seed: int) -> dict[str, Any]:
    """For `--set`: all that bears on the result, whatever params.yaml holds."""
    settings: dict[str, dict[str, Any]] = {
        "model": {"source": str(model), "revision": None, "dtype": "float32"},
        "prepare": {"dataset": None, "columns": {}, "group_by": None, "max_chars": None}
        | {"valid_fraction": 0.0, "valid_rows": None, "test_fraction": 0.0, "test_rows": None},
        "tokenize": {"max_length": MAX_LENGTH, "over_length": "error", "train_on": "all", "add_eos": True}
        | {"answer_marker": None, "chat_template": None},
        "lora": {"type": "lora", "rank": RANK, "alpha": SCALE * RANK, "scale": None, "rank_stabilized": False}
        | {"dropout": 0.0, "targets": list(MODULES), "layers": LAYERS},
        "train": {
            "init_adapter": None,
            "epochs": None,
            "iters": updates,
            "batch_size": BATCH_SIZE,
            "grad_accumulation": 1,
        }
        | {"optimizer": "adamw", "betas": BETAS, "weight_decay": WEIGHT_DECAY}
        | {"learning_rate": LEARNING_RATE, "schedule": "constant", "warmup_steps": 0, "max_grad_norm": None}
        | {"grad_checkpoint": False, "val_batches": 0, "keep": "last", "patience": None, "steps_per_eval": updates},
        "runtime": {"steps_per_save": updates},
    }
    return {"seed": seed} | {f"{part}.{key}": value for part, keys in settings.items() for key, value in keys.items()}


def their_settings(folder: Path, model: Path, updates: int, seed: int) -> dict[str, Any]:
    """For `mlx_lm lora --config`. With valid.jsonl missing it does not validate, as ours does not."""
    keys = [f"self_attn.{name}" for name in MODULES]
    # AdamW there leaves bias correction out by default.
    adamw = {"betas": BETAS, "weight_decay": WEIGHT_DECAY, "bias_correction": True}
    return {
        "model": str(model),
        "train": True,
        "fine_tune_type": "lora",
        "data": str(folder),
        "adapter_path": str(folder / "adapter"),
        "seed": seed,
        "num_layers": LAYERS,
        "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": keys},
        "batch_size": BATCH_SIZE,
        "iters": updates,
        "learning_rate": LEARNING_RATE,
        "optimizer": "adamw",
        "optimizer_config": {"adamw": adamw},
        "max_seq_length": MAX_LENGTH,
        "steps_per_report": 1,
        "save_every": updates + 1,
    }


def read_texts(project: Path) -> list[str]:
    """The rows that prepare left, as text."""
    with (project / "data" / "prepared" / "train.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row["text"] if row.get("text") else row["prompt"] + row["completion"] for row in rows]


def read_tokens(project: Path) -> list[TokenRow]:
    from stages.text import parquet

    identity = base.read(project / "artifacts" / "base.json").tokenizer_identity
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
    epochs = json.loads((artifacts / "metrics" / "train.json").read_text())["epochs"]
    timing = json.loads((artifacts / "timing" / "train.json").read_text())
    # An epoch trains on each row once.
    return Run(min(round(epochs * rows), rows), seconds, timing["tokens_per_second"], artifacts / "adapter")


def run_theirs(folder: Path, texts: Iterable[str], model: Path, updates: int, seed: int) -> Run:
    folder.mkdir()
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    config, record = folder / "config.json", folder / "record.json"
    config.write_text(json.dumps(their_settings(folder, model, updates, seed)))
    seconds = command(
        ["-c", THEIRS, str(record), "lora", "--config", str(config)],
        folder=folder,
        log=folder / "train.log",
        store=folder.parent / "store",
    )
    found = json.loads(record.read_text())
    spent, tokens = found["seconds"][1:], found["tokens"][1:]
    return Run(found["rows_seen"], seconds, sum(tokens) / sum(spent), folder / "adapter")


def theirs(record: Path) -> None:
    """`mlx_lm ARGUMENTS` in this process; its updates' seconds and tokens, and the rows it saw, go to `record`."""
    blas.preload()
    from mlx_lm.tuner import callbacks, datasets

    reports: list[dict[str, float]] = []
    sets: list[Any] = []

    class Recorder(callbacks.TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, float]) -> None:
            reports.append(train_info)

    class Watched(datasets.CacheDataset):
        def __init__(self, data: Any) -> None:
            super().__init__(data)
            sets.append(self)

    # Before mlx_lm.lora imports them by name.
    callbacks.get_reporting_callbacks = lambda *_, **__: Recorder()
    datasets.CacheDataset = Watched
    sys.argv = ["mlx_lm", *sys.argv[2:]]
    runpy.run_module("mlx_lm", run_name="__main__", alter_sys=True)
    totals = [0, *(report["trained_tokens"] for report in reports)]
    content = {
        "rows_seen": sum(row is not None for row in sets[0]._proc_data),
        "seconds": [1 / report["iterations_per_second"] for report in reports],
        "tokens": [after - before for before, after in itertools.pairwise(totals)],
    }
    record.write_text(json.dumps(content))


def stage(project: Path, name: str) -> float:
    """Run one of this project's stages in a project folder, all paths at their defaults; how long it took."""
    settings = json.loads((project / "set.json").read_text())
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    return command(
        ["-m", f"stages.{name}", *overrides],
        folder=project,
        log=project / f"{name}.log",
        store=project.parent / "store",  # and not the user's: the float32 base does not stay
    )


def command(arguments: list[str], *, folder: Path, log: Path, store: Path | None = None) -> float:
    """Run Python on this checkout's modules, in a folder, perhaps with a store of its own; how long it took.

    Raises:
        ValueError: it failed.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({"LORABUILD_STORE": str(store)} if store else {})
    environment.pop("DVC_ROOT", None)  # checkpoints lie in the folder
    started = time.perf_counter()
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    seconds = time.perf_counter() - started
    if done.returncode:
        last = " / ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
        raise ValueError(f"{arguments[1] if arguments[0] == '-m' else 'mlx_lm.lora'} failed: {last}")
    return seconds


# --- the common scorer


def losses(model: Path, adapter_dir: Path | None, rows: Sequence[TokenRow]) -> tuple[float, float]:
    """Nats a token: over all tokens, and over all but the EOS that ends each row."""
    import numpy as np

    from stages.lora import adapter
    from stages.lora.batches import collate, sorted_batches
    from stages.lora.head import narrow_head
    from stages.lora.loss import token_losses
    from stages.lora.model import load_base

    scored, _ = load_base(model, dtype="float32")
    if adapter_dir is not None:
        adapter.load(scored, adapter_dir)
    narrow_head(scored)
    scored.eval()
    found, is_eos = [], []
    for indices in sorted_batches([len(row.input_ids) for row in rows], batch_size=8):
        batch = collate([rows[i] for i in indices])
        found.append(np.array(token_losses(scored, batch)).astype(np.float64))
        is_eos.append(np.append(np.diff(batch.rows_N) > 0, True))
    losses_N, is_eos_N = np.concatenate(found), np.concatenate(is_eos)
    return float(losses_N.mean()), float(losses_N[~is_eos_N].mean())


if __name__ == "__main__":
    console.main(against_mlx_lm)
