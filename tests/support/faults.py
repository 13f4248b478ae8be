"""Kill real training processes at random moments and compare what they end in:
`python -m tests.support.faults [KILLS]`.

Each process trains the tiny model; a signal ends it at a random moment, and the next process goes on. In the end, files
must equal those of a process that nobody disturbed.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support.imports import ROOT

OUTPUTS = (
    "artifacts/adapter",
    "artifacts/metrics/train.json",
    "artifacts/plots/loss.csv",
    "artifacts/plots/valid_loss.csv",
)
TRAIN = [sys.executable, "-m", "stages.train", "--set", "train.iters=200", "--set", "runtime.steps_per_save=7"]


@dataclass(frozen=True)
class Fault:
    """One killed process."""

    name: str
    seconds: float
    resumed_at: int | None
    left_at: int | None
    status: int


def environment(folder: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PYTHONPATH": str(ROOT), "PATH": path, "LORABUILD_STORE": str(folder / "store")}


def prepare(folder: Path) -> None:
    """A project with the tiny model, ready to train."""
    from tests.support.tiny import small_params, write_llama

    write_llama(folder / "tiny", num_hidden_layers=4)
    (folder / "params.yaml").write_text(small_params(source="tiny"), encoding="utf-8")
    (folder / "data" / "raw").mkdir(parents=True)
    lines = [f'{{"question": "{i} 더하기 {i}는?", "answer": "{2 * i}이다."}}\n' for i in range(60)]
    (folder / "data" / "raw" / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    for stage in ("fetch", "prepare", "tokenize"):
        command = [sys.executable, "-m", f"stages.{stage}"]
        subprocess.run(command, cwd=folder, env=environment(folder), check=True, capture_output=True)


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every output file."""
    paths = [folder / name for name in OUTPUTS]
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def undisturbed(folder: Path) -> tuple[dict[str, str], float]:
    """Digests of an undisturbed run's outputs, and its seconds; the outputs are removed again."""
    started = time.monotonic()
    subprocess.run(TRAIN, cwd=folder, env=environment(folder), check=True, capture_output=True)
    seconds = time.monotonic() - started
    made = digests(folder)
    remove_outputs(folder)
    return made, seconds


def remove_outputs(folder: Path) -> None:
    """As DVC does before it runs a stage."""
    for path in (folder / name for name in OUTPUTS):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def kill_one(folder: Path, kind: signal.Signals, seconds: float) -> Fault:
    """Start training, send the signal after so many seconds, wait for the end."""
    process = subprocess.Popen(
        TRAIN, cwd=folder, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(kind)
        output, _ = process.communicate(timeout=60)
    assert "Traceback" not in output, output
    return Fault(
        kind.name if process.returncode else f"(ended before {kind.name})",
        seconds,
        _step(r"going on after step (\d+)", output),
        _step(r"step +(\d+)", output),
        process.returncode,
    )


def _step(pattern: str, output: str) -> int | None:
    found = re.findall(pattern, output)
    return int(found[-1]) if found else None


def finish(folder: Path) -> tuple[dict[str, str], int | None]:
    """Let a last process finish; the outputs, and where it took up."""
    done = subprocess.run(TRAIN, cwd=folder, env=environment(folder), check=True, capture_output=True, text=True)
    return digests(folder), _step(r"going on after step (\d+)", done.stdout)


def main(kills: int = 20, seed: int = 0) -> int:
    """Print a table of faults; exit status 1 if the bytes differ."""
    from stages.cli import console

    chance = random.Random(seed)  # noqa: S311
    kinds = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    rows: list[tuple[str, str, str, str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        expected, seconds = undisturbed(folder)
        with console.progress("faults", total=kills) as advance:
            equal = True
            for number in range(kills):
                fault = kill_one(folder, kinds[number % 3], chance.uniform(0.2 * seconds, 0.7 * seconds))
                resumed = "-" if fault.resumed_at is None else str(fault.resumed_at)
                last = number == kills - 1 or (folder / "artifacts" / "metrics" / "train.json").exists()
                verdict = ""
                if last:  # the run is over: compare, and begin another
                    found, _ = finish(folder)
                    verdict = "yes" if found == expected else "NO"
                    equal = equal and found == expected
                    remove_outputs(folder)
                rows.append((fault.name, f"{fault.seconds:.2f} s", resumed, verdict))
                advance(1)
    console.table(f"{kills} interruptions", ("signal", "moment", "resumed at step", "bytes equal"), rows)
    console.say("every run ended in the bytes of an undisturbed one" if equal else "BYTES DIFFER")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
