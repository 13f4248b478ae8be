"""Six learning rates: this project under DVC, against six runs of mlx_lm.lora under the same BLAS.

`python -m benchmarks.sweep [--rows 88] [--measured 2]` copies the project into a repository of its own and times there
the first `dvc repro`, a second with another `train.learning_rate`, and, with the cache of frozen layers deleted, six
queued experiments up to `evaluate`. mlx_lm.lora trains and evaluates on the same token rows; of its six runs
`--measured` are run, and the six are taken to last as long on the average. Writes sweep.json into `--out`, which
`make bench` quotes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import contenders, ground
from benchmarks.processes import ROOT, run
from benchmarks.targets import targets
from stages.base.manifest import read_manifest
from stages.cli import console
from stages.files import outputs
from stages.model import blas

RATES = (5e-5, 7e-5, 1.5e-4, 2e-4, 3e-4, 5e-4)
FIRST, SECOND = 1e-4, 1.2e-4
VALID, TEST = 8, 16  # rows


def sweep(
    rows: Annotated[int, typer.Option(min=40, help="Rows of the default data to use.")] = 88,
    measured: Annotated[int, typer.Option(min=1, max=len(RATES), help="Runs of mlx_lm.lora.")] = 2,
    out: Annotated[Path, typer.Option(help="The folder for the results.")] = Path("benchmarks/results"),
    keep: Annotated[Path | None, typer.Option(help="Work in this new folder and leave it there.")] = None,
) -> None:
    """Time a sweep of six learning rates, evaluation included."""
    blas.preload()
    if keep is not None:
        keep.mkdir(parents=True)
    with nullcontext(str(keep.resolve())) if keep else tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        project = make_project(folder / "project", rows)
        found: dict[str, Any] = {"points": len(RATES), "measured": measured}
        with console.progress("first experiment"):
            found["first"] = dvc(project, "repro")
        commit(project)
        set_parameters(project, {"train.learning_rate": SECOND})
        with console.progress("second experiment"):
            found["second"] = dvc(project, "repro")
        commit(project)
        shutil.rmtree(project / "artifacts" / "cache", ignore_errors=True)
        points = ",".join(map(str, RATES))
        with console.progress("six experiments"):
            queued = dvc(project, "exp", "run", "--queue", "-S", f"train.learning_rate={points}", "evaluate")
            found["ours"] = queued + dvc(project, "exp", "run", "--run-all")
        work = make_ground(folder / "ground", project)
        found["updates"] = work.updates
        with console.progress("mlx_lm.lora"):
            seconds = [run_theirs(work, folder / f"mlx_lm-{rate}", rate) for rate in RATES[:measured]]
        found["theirs"] = sum(seconds) / measured * len(RATES)
    outputs.write_json(out / "sweep.json", found)
    console.table(
        f"{work.updates} updates each",
        ("", "seconds"),
        ((k, round(found[k])) for k in ("first", "second", "ours", "theirs")),
    )
    console.table("Targets", ("target", "measured", ""), targets({"kinds": {}, "sweep": found}))


def make_project(folder: Path, rows: int) -> Path:
    """A repository with this checkout's files, some rows and the benchmarks' parameters."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "dvc.lock").unlink(missing_ok=True)
    raw = folder / "data" / "raw" / "korean_qa.jsonl"
    raw.write_text("".join(raw.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]), encoding="utf-8")
    updates = ground.EPOCHS * (rows - VALID - TEST) // ground.TRAINING["batch_size"]
    settings = ground.our_settings(lora=ground.LORA, training=ground.TRAINING | {"updates": updates}, seed=ground.SEED)
    held_out = {"prepare.valid_fraction": None, "prepare.valid_rows": VALID}
    held_out |= {"prepare.test_fraction": None, "prepare.test_rows": TEST}
    length = {"tokenize.max_length": ground.TRAINING["max_length"], "train.val_batches": -1}
    epochs = {"train.iters": None, "train.epochs": ground.EPOCHS, "train.learning_rate": FIRST}
    set_parameters(folder, settings | held_out | length | epochs)
    who = {f"GIT_{role}_{what}": "bench@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    os.environ |= who | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    commit(folder)
    return folder


def set_parameters(project: Path, settings: dict[str, Any]) -> None:
    """Write them into the project's params.yaml."""
    from ruamel.yaml import YAML

    yaml, path = YAML(), project / "params.yaml"
    tree = yaml.load(path.read_text(encoding="utf-8"))
    for dotted, value in settings.items():
        *sections, key = dotted.split(".")
        (tree[sections[0]] if sections else tree)[key] = value
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(tree, file)


def commit(project: Path) -> None:
    subprocess.run(["git", "add", "--all"], cwd=project, check=True)
    subprocess.run(["git", "commit", "--quiet", "--message", "as measured"], cwd=project, check=True)


def dvc(project: Path, *arguments: str) -> float:
    return run(["-m", "dvc", *arguments], folder=project, log=project.parent / f"dvc-{arguments[0]}.log").seconds


def make_ground(folder: Path, project: Path) -> contenders.Ground:
    """The rows that the project trained on, for mlx_lm.lora: the batches in their order, full ones alone."""
    from stages.tokens.parquet import read_tokens

    folder.mkdir()
    ground.write_float32_base(folder)
    shutil.copyfile(project / "artifacts" / "base.json", folder / "base.json")
    identity = read_manifest(folder / "base.json").tokenizer_identity
    tokens = [project / "data" / "tokens" / f"{name}.parquet" for name in ground.SPLITS]
    train, valid, test = (read_tokens(path, tokenizer=identity) for path in tokens)
    ground.write_rows(folder, "answers", train, test)
    path, size = folder / "answers" / "rows.json", ground.TRAINING["batch_size"]
    content = json.loads(path.read_text())
    content["train"] = [batch for batch in content["train"] if len(batch) == size]
    content["validate"] = [ground.plain(row) for row in valid]
    path.write_text(json.dumps(content))
    ground.write_start(folder, ground.LORA)
    return contenders.Ground(folder, "answers", len(content["train"]) // ground.EPOCHS, ground.LORA, ground.TRAINING)


def run_theirs(work: contenders.Ground, folder: Path, rate: float) -> float:
    """Seconds of one mlx_lm.lora command: training, validation at its start and end, evaluation."""
    folder.mkdir()
    work = contenders.Ground(work.folder, work.kind, work.per_epoch, work.lora, work.training | {"learning_rate": rate})
    seconds, _ = contenders.run_mlx_lm(work, folder, rows="rows.json", blas=True, updates=work.updates, test=True)
    return seconds


if __name__ == "__main__":
    console.main(sweep)
