"""Every contender in turn, round after round, on the same rows: `make bench`, or

`python -m benchmarks.bench [--data DIR] [--set tokenize.answer_marker=…] [--rounds 3] [--peers PYTHON]`. Writes
bench.json (every run's figures), bench.md and bench.svg into `--out`. This process measures others and stays small: it
never imports MLX.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import growth, report
from benchmarks.contenders import Contender, Ground, contenders
from benchmarks.ground import EPOCHS, KINDS, LORA, TRAINING
from benchmarks.processes import ROOT, run
from stages.cli import console
from stages.model import blas

RESULTS = Path("benchmarks/results")


def bench(
    data: Annotated[Path | None, typer.Option(help="A file or folder of rows, instead of data/raw.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="For prepare and tokenize.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 3,
    updates: Annotated[int, typer.Option(min=2, help="Batches an epoch; each run is two epochs.")] = 2,
    quick: Annotated[
        bool, typer.Option("--quick", help="One round, without each saving by itself and growth.")
    ] = False,
    peers: Annotated[Path | None, typer.Option(help="The Python of an environment with torch and peft.")] = None,
    only: Annotated[str, typer.Option(help="The letters of the contenders to measure.")] = "abcde",
    out: Annotated[Path, typer.Option(help="The folder for the results.")] = RESULTS,
    keep: Annotated[Path | None, typer.Option(help="Work in this new folder and leave it there.")] = None,
) -> None:
    """Speed, memory and loss of mlx_lm.lora, PEFT and this project, side by side."""
    started, rounds = time.perf_counter(), 1 if quick else rounds
    if keep is not None:
        keep.mkdir(parents=True)
    with nullcontext(str(keep.resolve())) if keep else tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with console.progress("preparing"):
            given = [part for text in settings or [] for part in ("--set", text)]
            given += ["--data", str(data.resolve())] if data else []
            ground = ["-m", "benchmarks.ground", str(folder / "ground"), "--updates", str(updates), *given]
            run(ground, folder=ROOT, log=folder / "ground.log")
        work = {kind: Ground(folder / "ground", kind, updates, LORA, TRAINING) for kind in KINDS}
        found: dict[str, Any] = {
            "machine": machine(),
            "versions": versions(peers),
            "data": str(data.name if data else "the default data") + "".join(f", {text}" for text in settings or []),
            "rounds": rounds,
            "updates": updates * EPOCHS,
            "batches": {kind: about(ground) for kind, ground in work.items()},
        }
        # The longest rows are then in batches of the same size as everybody's, and shorter ones in larger.
        budget = TRAINING["batch_size"] * found["batches"]["whole"]["longest"]
        field = contenders(str(peers) if peers else None, stock=blas.is_needed(), token_budget=budget)
        field = [each for each in field if each.name[1] in only and not (quick and (each.is_step or each.once))]
        found["kinds"] = measure(folder, work, field, rounds)
        for kind in KINDS:
            with console.progress(f"scoring {kind}"):
                score(folder, kind, found["kinds"][kind])
                child = ["-m", "benchmarks.limit", str(folder / "ground"), kind, str(folder / "limit.json")]
                run(child, folder=ROOT, log=folder / "limit.log")
                found.setdefault("limit", {})[kind] = json.loads((folder / "limit.json").read_text())
        if not quick:
            rivals = [each for each in field if each.name.startswith("(b)")]
            rivals += [each for each in field if each.name.startswith("(e)") and each.same_updates][-1:]
            found["growth"] = growth.measure(folder / "growth", rivals, ends_only=rounds == 1, tell=console.say)
    found["seconds"] = round(time.perf_counter() - started)
    for path in report.write(found, out):
        console.say(str(path))
    console.out.print(report.markdown(found), markup=False, soft_wrap=True)


def measure(
    folder: Path, work: dict[str, Ground], field: list[Contender], rounds: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Runs by kind of loss and contender, in turns, so that whatever else the machine does slows all of them."""
    found: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in work}
    for number in range(rounds):
        for kind, ground in work.items():
            for index, contender in enumerate(field):
                # mlx-lm's work is the same whatever the mask: what is measured once serves for both.
                if contender.once and (number or kind != "whole"):
                    continue
                place = folder / "runs" / f"{number}-{kind}-{index}"
                place.mkdir(parents=True)
                with console.progress(f"round {number + 1}: {kind}, {contender.name}"):
                    figures = contender.run(ground, place).plain()
                console.say(
                    f"round {number + 1}  {kind:8} {contender.name:32} "
                    f"{figures['first_epoch']:6,.0f} {figures['second_epoch']:6,.0f} tokens/s  "
                    f"{figures['peak_memory_bytes'] / 1e6:6,.0f} MB"
                )
                for each in work if contender.once else [kind]:
                    entry = found[each].setdefault(contender.name, {"runs": []})
                    entry["same_updates"] = contender.same_updates
                    entry["runs"].append(figures)
                shutil.rmtree(place / "artifacts", ignore_errors=True)  # a cache of frozen layers is large
    return found


def score(folder: Path, kind: str, found: dict[str, dict[str, Any]]) -> None:
    """The loss of each contender's adapter, by one judge."""
    judged = [name for name, entry in found.items() if entry["same_updates"]]
    adapters = [found[name]["runs"][0]["adapter"] for name in judged]
    child = ["-m", "benchmarks.score", str(folder / "ground"), kind, str(folder / "scores.json"), *adapters]
    run(child, folder=ROOT, log=folder / "score.log")
    untrained, *losses = json.loads((folder / "scores.json").read_text())
    for name, loss in zip(judged, losses, strict=True):
        found[name] |= {"untrained": untrained, "loss": loss}


def about(ground: Ground) -> dict[str, Any]:
    """An update's tokens and trained tokens, on the average."""
    batches = json.loads((ground.folder / ground.kind / "rows.json").read_text())["train"]
    rows = [row for batch in batches for row in batch]
    return {
        "tokens": sum(len(row["ids"]) for row in rows) / len(batches),
        "trained_tokens": sum(len(row["ids"]) - max(row["first"], 1) for row in rows) / len(batches),
        "longest": max(len(row["ids"]) for row in rows),
    }


def machine() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}"


def versions(peers: Path | None) -> dict[str, str]:
    """Of what takes part, by the environment it is in."""
    own = ["mlx", "mlx-lm", "numpy", *(["scipy-openblas32"] if blas.is_needed() else [])]
    found = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in own}
    if peers is not None:
        names = ["torch", "peft", "transformers"]
        code = f"from importlib.metadata import version; print(*map(version, {names}))"
        printed = subprocess.run([peers, "-c", code], check=True, capture_output=True, text=True).stdout
        found |= dict(zip(names, printed.split(), strict=True))
    return found


if __name__ == "__main__":
    console.main(bench)
