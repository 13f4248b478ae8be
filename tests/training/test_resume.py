"""Runs that are interrupted: saved and left on a signal, taken up again, never by two processes at once."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from stages.base import store
from stages.cli import interrupts
from stages.train import train
from stages.training import resume
from tests.support import faults

ITERS = next(argument for argument in faults.TRAIN if argument.startswith("train.iters"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("faults")
    faults.prepare(made)
    return made


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, str]:
    return faults.undisturbed(folder)[0]


def start(folder: Path, until: str = "step") -> subprocess.Popen[str]:
    """A training process that has come so far as to print `until`."""
    shutil.rmtree(folder / "artifacts" / "checkpoints", ignore_errors=True)
    process = subprocess.Popen(
        faults.TRAIN, cwd=folder, env=faults.environment(folder), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(until):
            return process
    rest(process)
    raise AssertionError("it ended too early")


def rest(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=60)[0]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_loses_nothing(folder: Path, expected: dict[str, str], kind: signal.Signals) -> None:
    process = start(folder, "step    20")
    process.send_signal(kind)
    output = rest(process)
    if kind == signal.SIGKILL:
        assert process.returncode == -kind
    else:
        assert process.returncode == 128 + kind
        assert f"stopped by {kind.name} after step" in output
    assert not (folder / "artifacts" / "adapter").exists()
    found, resumed_at = faults.finish(folder)
    assert resumed_at is not None and resumed_at >= 7
    assert found == expected
    faults.remove_outputs(folder)


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from stages.cli.interrupts import stop_requests\n"
        "with stop_requests() as requested:\n"
        "    print('ready', flush=True)\n"
        "    while not requested(): time.sleep(0.01)\n"
        "    print('asked', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGTERM)
    rest(process)
    assert process.returncode == -signal.SIGTERM


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts.stop_requests() as requested:
            os.kill(os.getpid(), signal.SIGHUP)
            assert requested() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with interrupts.stop_requests():
        pass
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_stage_whose_dvc_is_gone_saves_and_leaves(folder: Path) -> None:
    """The shell between stands for DVC; killed alone, it leaves its child behind."""
    command = " ".join(f"'{part}'" for part in faults.TRAIN)
    environment = faults.environment(folder) | {"DVC_ROOT": str(folder)}
    shell = subprocess.Popen(
        ["sh", "-c", f"{command}; true"], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert shell.stdout is not None
    for line in shell.stdout:
        if line.startswith("step    20"):
            break
    shell.kill()
    output = rest(shell)  # until the orphan has closed it
    assert "stopped by the end of the DVC that started it" in output
    assert not (folder / "artifacts" / "adapter").exists()


def test_checkpoints_lie_in_dvcs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert store.project("checkpoints") == Path("artifacts/checkpoints")
    monkeypatch.setenv("DVC_ROOT", "/somewhere")
    assert store.project("checkpoints") == Path("/somewhere/artifacts/checkpoints")


def test_a_second_process_of_the_same_run_is_refused_with_the_first_ones_id(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "LOCK_SECONDS", 0)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LORABUILD_STORE", str(folder / "store"))
    process = start(folder)
    try:
        process.send_signal(signal.SIGSTOP)  # still there, holding its lock
        with pytest.raises(ValueError, match=f"process {process.pid} trains this very run already"):
            train(overrides=[ITERS, "runtime.steps_per_save=7"])
    finally:
        process.kill()
        rest(process)


def test_a_process_that_is_leaving_is_waited_for(folder: Path) -> None:
    first = start(folder)
    second = subprocess.Popen(
        faults.TRAIN, cwd=folder, env=faults.environment(folder), stdout=subprocess.PIPE, text=True
    )
    time.sleep(1.0)
    first.terminate()
    rest(first)
    assert second.stdout is not None
    assert "going on after step" in "".join(line for line, _ in zip(second.stdout, range(20), strict=False))
    second.terminate()
    rest(second)


@pytest.mark.parametrize(
    "override",
    ["train.learning_rate=0.02", "lora.rank=2", "seed=5", "train.steps_per_eval=50"],
)
def test_another_run_starts_afresh(
    folder: Path, override: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start(folder, "step    20")
    process.kill()
    rest(process)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LORABUILD_STORE", str(folder / "store"))

    def stop(*_: Any, **__: Any) -> None:
        raise typer.Exit(1)

    monkeypatch.setattr("stages.training.loop.Trainer.run", stop)
    with pytest.raises(typer.Exit):
        train(overrides=[ITERS, override])
    assert "going on" not in capsys.readouterr().out
    with pytest.raises(typer.Exit):
        train(overrides=[ITERS, "runtime.steps_per_save=3"])
    assert "going on after step" in capsys.readouterr().out


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_intact(folder: Path, expected: dict[str, str]) -> None:
    """A limit on the size of files stands for the disk: what is longer cannot be written."""
    process = start(folder, "step    20")
    process.kill()
    rest(process)
    (run,) = (folder / "artifacts" / "checkpoints").iterdir()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    limit = min(len(content) for path, content in before.items() if path.suffix == ".safetensors") // 2
    done = subprocess.run(
        faults.TRAIN,
        cwd=folder,
        env=faults.environment(folder),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "arrays.safetensors: cannot be written" in line
    assert {path: path.read_bytes() for path in before} == before
    assert faults.finish(folder)[0] == expected
    faults.remove_outputs(folder)


def test_a_folder_for_checkpoints_that_cannot_be_made_is_one_line(folder: Path) -> None:
    shutil.rmtree(folder / "artifacts" / "checkpoints", ignore_errors=True)
    (folder / "artifacts" / "checkpoints").write_text("in the way")
    try:
        done = subprocess.run(faults.TRAIN, cwd=folder, env=faults.environment(folder), capture_output=True, text=True)
    finally:
        (folder / "artifacts" / "checkpoints").unlink()
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: artifacts/checkpoints")
