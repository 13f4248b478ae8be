"""Data-parallel ranks: together they do what one process does, and they live and die together.

Two processes on this machine stand for two machines: each has a folder of its own, and the second one's has neither
adapter nor checkpoints.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from stages.baseline import baseline
from stages.cli import console
from stages.evaluate import evaluate
from stages.lora import adapter
from stages.merge import merge
from stages.model.load import load_base
from stages.scoring import ranks as distributed
from stages.scoring.ranks import ALONE, Ranks
from stages.scoring.score import Score, gather_scores
from stages.tokens.row import TokenRow
from stages.train import train
from stages.training import loop, progress
from tests.support import faults
from tests.support.adapters import config
from tests.support.runs import OPTIONS, make_trainer

SECONDS = 90  # after which a process that hangs is killed
# 36 rows, 5 an update: the eighth of each epoch has one row, fewer than ranks.
RUN = ["train.epochs=4", "train.iters=null", "train.batch_size=5", "train.steps_per_eval=16", "train.keep=best"]
RUN += ["runtime.steps_per_save=5"]
TRAIN = ["-m", "stages.train", *(f"--set={override}" for override in RUN)]


class Apart(Ranks):
    """One rank of many, which meets nobody: its sums are its own share."""

    def __init__(self, rank: int, size: int) -> None:
        self.__dict__ |= {"_rank": rank, "_size": size, "group": None}

    @property
    def rank(self) -> int:
        return int(self.__dict__["_rank"])

    @property
    def size(self) -> int:
        return int(self.__dict__["_size"])


@given(lengths=st.lists(st.integers(2, 500), max_size=40), size=st.integers(1, 6))
def test_every_row_is_dealt_to_one_rank(lengths: list[int], size: int) -> None:
    hands = [Apart(rank, size).shard(lengths) for rank in range(size)]
    assert sorted(index for hand in hands for index in hand) == list(range(len(lengths)))
    assert max(map(len, hands)) - min(map(len, hands)) <= 1
    assert all(hand == sorted(hand) for hand in hands)


def test_ranks_get_about_as_many_tokens() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 64).tolist()
    shares = [sum(lengths[i] for i in Apart(rank, 4).shard(lengths)) for rank in range(4)]
    assert max(shares) < 1.02 * min(shares)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("count", [11, 3])
def test_the_ranks_gradients_sum_up_to_the_whole(tiny_llama: Path, rows: list[TokenRow], size: int, count: int) -> None:
    def gradients(ranks: Ranks) -> tuple[dict[str, mx.array], progress.Sums]:
        model = load_base(tiny_llama)[0]
        adapter.attach(model, config(), seed=0)
        options = OPTIONS | {"batch_size": 6, "grad_accumulation": 2}
        return make_trainer(model, rows, rows, **(options), ranks=ranks)._gradients(rows[:count])

    whole, done = gradients(ALONE)
    parts = [gradients(Apart(rank, size)) for rank in range(size)]
    for name, gradient in whole.items():
        total = sum((np.array(part[name]) for part, _ in parts), np.zeros(gradient.shape))
        np.testing.assert_allclose(total, gradient, rtol=1e-4, atol=1e-6)
    assert sum(part.rows for _, part in parts) == done.rows == count
    assert sum(part.trained_tokens for _, part in parts) == done.trained_tokens
    assert sum(part.loss_sum for _, part in parts) == pytest.approx(done.loss_sum)


def test_a_rank_has_its_part_of_a_batch_in_memory_at_a_time(tiny_llama: Path, rows: list[TokenRow]) -> None:
    model = load_base(tiny_llama)[0]
    adapter.attach(model, config(), seed=0)
    trainer = make_trainer(model, rows, rows, **(OPTIONS | {"batch_size": 5, "val_batches": -1}), ranks=Apart(1, 2))
    assert max(batch.inputs_BxL.shape[0] for batch in trainer._valid_batches()) == 3


def test_dropout_follows_from_seed_step_and_rank(tiny_llama: Path, rows: list[TokenRow]) -> None:
    seeds = {loop._dropout_seed(0, step, rank) for step in range(1, 5) for rank in range(4)}
    assert len(seeds) == 16

    def loss_sum(rank: int) -> float:
        model = load_base(tiny_llama)[0]
        adapter.attach(model, config(dropout=0.5), seed=0)
        for array in adapter.weights(model).values():
            array[...] = 0.1
        trainer = make_trainer(model, rows, rows, **(OPTIONS | {"iters": 1}), ranks=Apart(rank, 2))
        trainer.ranks.__dict__["shard"] = lambda lengths: list(range(len(lengths)))  # the same rows for either rank
        for _ in trainer.run():
            pass
        return trainer.progress.total.loss_sum

    assert loss_sum(1) == loss_sum(1) != loss_sum(0)


def test_every_rank_takes_rank_0s_weights(tiny_llama: Path, rows: list[TokenRow]) -> None:
    def moved(rank: int) -> bool:
        model = load_base(tiny_llama)[0]
        adapter.attach(model, config(), seed=0)
        for _ in make_trainer(model, rows, rows, **(OPTIONS | {"iters": 1}), ranks=Apart(rank, 2)).run():
            pass
        return any(bool(array.any().item()) for array in adapter.weights(model).values())

    # Rank 1 puts nothing into the sum that is everyone's new weights.
    assert moved(0) and not moved(1)


def test_alone_everything_comes_back_as_it_was() -> None:
    arrays = {"b": mx.array([1.0, -0.0]), "a": mx.array(2, dtype=mx.bfloat16)}
    assert all(ALONE.sum_arrays(arrays)[name] is array for name, array in arrays.items())
    assert all(ALONE.broadcast_arrays(arrays)[name] is array for name, array in arrays.items())
    assert ALONE.broadcast_bytes(b"x") == b"x"
    assert ALONE.sum([0.1, 2]) == [0.1, 2.0]
    ALONE.check_equal({"a": 1})
    scores = {1: Score(0.1, 1, 2, 3), 0: Score(0.7, 4, 5, 6)}
    assert gather_scores(scores, rows=2, ranks=ALONE) == [scores[0], scores[1]]


def test_ranks_that_would_train_something_else_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(_: Ranks, numbers: Sequence[float]) -> np.ndarray:
        others = np.array([numbers] * 3)
        others[1, 0] += 1
        others[2] += 1
        return others

    monkeypatch.setattr(Ranks, "gather", gather)
    with pytest.raises(ValueError) as caught:
        Apart(0, 3).check_equal({"params": {"seed": 1}, "tokens": "a"})
    one, two = str(caught.value).splitlines()
    assert one.startswith("rank 1 differs from rank 0 in: params; give its machine the same")
    assert two.startswith("rank 2 differs from rank 0 in: params, tokens; ")


def test_only_a_process_launched_with_others_looks_for_them(tmp_path: Path) -> None:
    (tmp_path / "none").write_text("\n")
    (tmp_path / "two").write_text('[["127.0.0.1:1"], ["127.0.0.1:2"]]\n')
    for environment, expected in [
        ({}, None),
        ({"MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "none")}, None),
        ({"MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "two")}, "ring"),
        ({"MLX_RANK": "0", "MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "127.0.0.1"}, "nccl"),
        ({"MLX_RANK": "0", "MLX_IBV_DEVICES": "devices", "MLX_JACCL_COORDINATOR": "127.0.0.1:1"}, "jaccl"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpi"),
    ]:
        assert distributed._backend(environment) == expected, environment


def test_ranks_that_cannot_be_reached_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
    (tmp_path / "hosts.json").write_text("{broken")
    with pytest.raises(ValueError, match="the other ranks cannot be reached by ring: "):
        distributed.join()


def test_another_rank_is_silent_but_for_errors_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "RANK_0_SECONDS", 0)

    def command() -> None:
        console.follow(1)
        console.say("hello")
        console.warn("careful")
        raise ValueError("no memory\nnot at all")

    monkeypatch.setattr(sys, "argv", ["command"])
    try:
        with pytest.raises(SystemExit):
            console.main(command)
    finally:
        console.follow(0)
    heard = capfd.readouterr()
    assert heard.out == ""
    assert heard.err == "rank 1: error: no memory\nrank 1: error: not at all\n"


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of two machines with the same rows, parameters and base model."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    faults.prepare(one)
    shutil.copytree(one, two, dirs_exist_ok=True)
    return one, two


def written(folder: Path) -> set[str]:
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    # A machine's store and cache are its own matter.
    return {path for path in paths if not path.startswith(("store/", "artifacts/cache/"))}


@contextmanager
def ended(processes: Sequence[subprocess.Popen[str]]) -> Iterator[None]:
    """None of the processes, nor what they started, outlives the block or SECONDS."""

    def kill() -> None:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(SECONDS, kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        kill()
        for process in processes:
            process.wait()
            if process.stdout:
                process.stdout.close()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def ranks(machines: tuple[Path, Path], *arguments: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks of Python, each in its folder, with the environment that `mlx.launch --backend ring` gives them."""
    hosts = machines[0].parent / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]), encoding="utf-8")
    started = [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=faults.environment(folder) | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank, folder in enumerate(machines)
    ]
    with ended(started):
        yield started


def outputs(processes: list[subprocess.Popen[str]]) -> list[str]:
    return [process.communicate()[0] for process in processes]


def curve(folder: Path, name: str, column: str) -> np.ndarray:
    with (folder / "artifacts" / "plots" / name).open(encoding="utf-8") as file:
        return np.array([float(row[column]) for row in csv.DictReader(file)])


def results(folder: Path) -> dict[str, Any]:
    metrics = json.loads((folder / "artifacts" / "details" / "train.json").read_text(encoding="utf-8"))
    return {
        "loss": curve(folder, "loss.csv", "loss"),
        "grad_norm": curve(folder, "loss.csv", "grad_norm"),
        "valid_loss": curve(folder, "valid_loss.csv", "valid_loss"),
        "counts": [metrics[name] for name in ("steps", "epochs", "trained_tokens", "kept_step")],
        "adapter": load_file(folder / "artifacts" / "adapter" / "adapters.safetensors"),
    }


@pytest.fixture(scope="module")
def launched(machines: tuple[Path, Path]) -> tuple[str, dict[str, Any], dict[str, str]]:
    """The output and the results of two processes of the launcher on one machine."""
    folder = machines[0]
    (port,) = free_ports(1)
    launcher = Path(sys.executable).with_name("mlx.launch")
    command = [str(launcher), "-n", "2", "--backend", "ring", "--starting-port", str(port), "--"]
    command += [sys.executable, *TRAIN]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=faults.environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with ended([process]):
        (said,) = outputs([process])
    found = results(folder), faults.digests(folder)
    faults.remove_outputs(folder)
    return said, *found


def test_two_ranks_train_as_one_does(
    machines: tuple[Path, Path],
    launched: tuple[str, dict[str, Any], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = machines[0]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LORABUILD_STORE", str(folder / "store"))
    train(overrides=RUN)
    alone, together = results(folder), launched[1]
    assert together["counts"] == alone["counts"]
    for name in ("loss", "grad_norm", "valid_loss"):
        np.testing.assert_allclose(together[name], alone[name], rtol=1e-4)
    for name, array in alone["adapter"].items():
        np.testing.assert_allclose(together["adapter"][name], array, rtol=1e-2, atol=1e-4)


def test_only_one_rank_talks(launched: tuple[str, dict[str, Any], dict[str, str]]) -> None:
    said = launched[0]
    assert "data-parallel on 2 ranks" in said
    assert said.count("Training → artifacts/adapter") == said.count("step    32  ") == 1


def test_evaluate_scores_on_two_ranks_what_it_scores_on_one(
    machines: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = machines
    monkeypatch.chdir(one)
    monkeypatch.setenv("LORABUILD_STORE", str(one / "store"))
    if not Path("artifacts/adapter").exists():
        train(overrides=["train.iters=3"])
    Path("data/prompts.jsonl").write_text('{"prompt": "9 + 9?"}\n', encoding="utf-8")
    Path("data/general.jsonl").write_text('{"text": "It rains."}\n', encoding="utf-8")
    baseline()
    merge()
    evaluate()
    alone = pq.read_table("artifacts/evaluate/rows.parquet").to_pydict()
    metrics = json.loads(Path("artifacts/details/evaluate.json").read_text(encoding="utf-8"))
    shutil.rmtree("artifacts/evaluate")
    for name in ("baseline", "merged"):
        shutil.copytree(one / "artifacts" / name, two / "artifacts" / name)
    before = written(two)
    with ranks(machines, "-m", "stages.evaluate") as processes:
        said = outputs(processes)
        assert [process.returncode for process in processes] == [0, 0], said
    assert said[1] == ""
    assert written(two) == before
    together = pq.read_table("artifacts/evaluate/rows.parquet").to_pydict()
    for name, column in alone.items():
        if name.endswith("_loss"):
            np.testing.assert_allclose(together[name], column, rtol=1e-5)
        else:
            assert together[name] == column, name
    found = json.loads(Path("artifacts/details/evaluate.json").read_text(encoding="utf-8"))
    assert (found["rows"], found["tokens"]) == (metrics["rows"], metrics["tokens"])
    for name in ("base", "adapter"):
        assert found["models"][name]["loss"]["value"] == pytest.approx(
            metrics["models"][name]["loss"]["value"], abs=2e-4
        )


def until(process: subprocess.Popen[str], start: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return
    raise AssertionError("it ended too early")


def test_stopped_or_killed_ranks_go_on_to_the_same_bytes(
    machines: tuple[Path, Path], launched: tuple[str, dict[str, Any], dict[str, str]]
) -> None:
    one, two = machines
    faults.remove_outputs(one)
    before = written(two)

    with ranks(machines, *TRAIN) as processes:
        until(processes[0], "step     2")
        processes[1].send_signal(signal.SIGTERM)
        said = outputs(processes)
        assert [process.returncode for process in processes] == [143, 143]
    assert "stopped by a request to rank 1 after step" in said[0]

    with ranks(machines, *TRAIN) as processes:
        until(processes[0], "going on after step")
        until(processes[0], "step ")
        processes[1].kill()
        said = outputs(processes)
        assert [process.returncode for process in processes] == [1, -signal.SIGKILL]
    assert "error: another rank has ended" in said[0]
    assert not (one / "artifacts" / "adapter").exists()

    with ranks(machines, *TRAIN) as processes:
        said = outputs(processes)
        assert [process.returncode for process in processes] == [0, 0], said
    assert "going on after step" in said[0]
    assert said[1] == ""
    assert faults.digests(one) == launched[2]
    assert written(two) == before


@pytest.mark.parametrize("signals", [1, 2])
def test_a_rank_that_waits_in_vain_can_be_ended(machines: tuple[Path, Path], signals: int) -> None:
    """On some transports, the end of a rank goes unnoticed by the others; here it just does not come."""
    code = (
        "import time; from stages.cli import interrupts; from stages.scoring import ranks as distributed\n"
        f"interrupts.LEAVE_SECONDS = {0.5 if signals == 1 else 60}\n"
        "ranks = distributed.join()\n"
        "with interrupts.stop_requests():\n"
        "    print('waiting', flush=True)\n"
        "    time.sleep(60) if ranks.rank else ranks.barrier()\n"
    )
    with ranks(machines, "-c", code) as processes:
        until(processes[0], "waiting")
        time.sleep(0.2)
        for _ in range(signals):
            processes[0].send_signal(signal.SIGTERM)
            time.sleep(0.1)
        assert processes[0].wait(timeout=20) == 143
