"""Checkpoints: whole or not there, damaged ones passed over, one process at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from stages.model import numerics
from stages.training import checkpoint
from stages.training.checkpoint import BusyError, Checkpoints, fingerprint
from stages.training.progress import Snapshot


def snapshot(step: int) -> Snapshot:
    return Snapshot({"weights/a": mx.full((3,), step), "optimizer/step": mx.array(step)}, {"step": step})


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    made = Checkpoints(tmp_path, "run")
    made.folder.mkdir()
    return made


def step_of(found: tuple[Snapshot | None, list[str]]) -> int | None:
    return None if found[0] is None else int(found[0].progress["step"])


def test_what_is_saved_is_what_is_read(checkpoints: Checkpoints) -> None:
    checkpoints.save(snapshot(7))
    found, damaged = checkpoints.latest()
    assert found is not None and damaged == []
    assert found.progress == {"step": 7}
    assert found.arrays["weights/a"].tolist() == [7, 7, 7]
    assert found.arrays["optimizer/step"].item() == 7


def test_two_are_kept(checkpoints: Checkpoints) -> None:
    for step in (5, 10, 15):
        checkpoints.save(snapshot(step))
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000010", "step-00000015"]


@pytest.mark.parametrize("name", ["arrays.safetensors", "progress.json", "SHA256SUMS"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "emptied", "removed"])
def test_a_damaged_one_is_passed_over_for_the_one_before(checkpoints: Checkpoints, name: str, how: str) -> None:
    for step in (5, 10):
        checkpoints.save(snapshot(step))
    path = checkpoints.folder / "step-00000010" / name
    content = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
    elif how == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2 if how == "truncated" else 0])
    found = checkpoints.latest()
    assert step_of(found) == 5
    assert found[1] == ["step-00000010"]


def test_without_any_there_is_nothing_to_resume(checkpoints: Checkpoints) -> None:
    assert checkpoints.latest() == (None, [])


def test_a_failed_save_leaves_the_one_before(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(snapshot(5))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_arrays", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(snapshot(10))
    assert step_of(checkpoints.latest()) == 5
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000005"]


def test_a_second_process_is_kept_out_and_told_by_whom(checkpoints: Checkpoints) -> None:
    with checkpoints.locked(), pytest.raises(BusyError, match=str(os.getpid())), checkpoints.locked():
        pass
    with checkpoints.locked():
        pass


def test_a_killed_process_leaves_no_lock(checkpoints: Checkpoints) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from stages.training.checkpoint import Checkpoints\n"
        "with Checkpoints(Path(sys.argv[1]), 'run').locked(): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(checkpoints.folder.parent)])
    assert done.returncode == -9
    with checkpoints.locked():
        pass


def test_clearing_leaves_nothing(checkpoints: Checkpoints) -> None:
    with checkpoints.locked():
        checkpoints.save(snapshot(5))
        checkpoints.clear()
    assert not checkpoints.folder.exists()


def test_the_fingerprint_follows_parts_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint(params={"a": 1, "b": 2})
    assert first == fingerprint(params={"b": 2, "a": 1})
    assert first != fingerprint(params={"a": 1, "b": 3})
    monkeypatch.setattr("stages.lora.code.sha256", lambda path: "another code")
    assert first != fingerprint(params={"a": 1, "b": 2})


def test_other_numerics_name_another_folder_of_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint(params={"a": 1})
    monkeypatch.setattr(numerics, "machine", lambda: numerics.in_use() | {"blas_threads": 64})
    other = fingerprint(params={"a": 1})
    assert first != other
    assert first[:24] == other[:24]


def test_snapshot_of_other_numerics_is_named_and_not_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, here, another_run = (Checkpoints(tmp_path, name) for name in ("a" * 24 + "1", "a" * 24 + "2", "b" * 25))
    with monkeypatch.context() as patch:
        patch.setattr(numerics, "machine", lambda: numerics.in_use() | {"blas_kernel": "SkylakeX"})
        with there.locked():
            there.save(snapshot(1))
    assert here.latest()[0] is None
    assert (found := here.elsewhere()) and found["blas_kernel"] == "SkylakeX"
    assert there.elsewhere() is None and another_run.elsewhere() is None
