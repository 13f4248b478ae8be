"""Checkpoints: a run's snapshots on disk, whole or not there, that only the same run takes up again.

A run's folder is named by its fingerprint, a digest of everything that shapes the result: parameters, token bytes, base
model, code and versions, and then of what rounds it: device and numerics. In it lie the last two snapshots,
`step-00000040/` with arrays.safetensors, progress.json and SHA256SUMS; numerics.json; and the lock that keeps a second
process out.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from stages.files.hashes import digest_of, sha256
from stages.files.outputs import replacing, write_json
from stages.lora import code
from stages.lora.arrays import write_arrays
from stages.model import numerics
from stages.scoring.ranks import ALONE, Ranks
from stages.training.progress import Snapshot

KEPT = 2
_ARRAYS, _PROGRESS, _SUMS = "arrays.safetensors", "progress.json", "SHA256SUMS"
_NUMERICS = "numerics.json"
_RUN = 24  # characters of a fingerprint that name the run, whatever rounds it


class BusyError(Exception):
    """Another process trains this very run; its id is the argument."""


def fingerprint(ranks: Ranks = ALONE, **parts: Any) -> str:
    """The name of a run: a digest of `parts`, of this code, of what computes, and of how many ranks there are.

    Raises:
        ValueError: another rank's is not the same.
    """
    parts |= code.fingerprint("stages.train")
    ranks.check_equal(parts | {"numerics": (rounds := rounding())})
    # Sums round differently in another number of parts.
    run = digest_of(parts | ({"ranks": ranks.size} if ranks.size > 1 else {}))
    return run[:_RUN] + digest_of(rounds)[:8]


def rounding() -> dict[str, Any]:
    """What rounds the results of this process, its device included."""
    return {"device": str(mx.default_device())} | numerics.machine()


class Checkpoints:
    """The snapshots of one run, in `root/fingerprint`."""

    def __init__(self, root: Path, fingerprint: str) -> None:
        self.folder = root / fingerprint

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's lock. The system releases it when the process ends, however it ends.

        Raises:
            BusyError: another process holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise BusyError(lock.read().strip() or "?") from None
            if not (self.folder / "lock").exists():
                # Its holder finished and cleared the folder away while this process opened the file.
                raise BusyError("?")
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            write_json(self.folder / _NUMERICS, rounding())
            yield

    def elsewhere(self) -> dict[str, Any] | None:
        """What rounded a snapshot of this very run that other numerics made, if there is one: it is not taken up."""
        for folder in sorted(self.folder.parent.glob(f"{self.folder.name[:_RUN]}*")):
            if folder != self.folder and any(folder.glob("step-*")):
                with suppress(OSError, ValueError):  # its process may be clearing it away
                    return cast(dict[str, Any], json.loads((folder / _NUMERICS).read_text(encoding="utf-8")))
        return None

    def save(self, snapshot: Snapshot) -> None:
        """Write a snapshot beside the others, all of it on the disk before it gets its name; drop the oldest."""
        with replacing(self.folder / f"step-{snapshot.progress['step']:08d}") as draft:
            draft.mkdir()
            write_arrays(draft / _ARRAYS, snapshot.arrays)
            (draft / _PROGRESS).write_text(json.dumps(snapshot.progress), encoding="utf-8")
            sums = "".join(f"{sha256(draft / name)}  {name}\n" for name in (_ARRAYS, _PROGRESS))
            (draft / _SUMS).write_text(sums, encoding="ascii")
            for path in (*draft.iterdir(), draft):
                _flush(path)
        _flush(self.folder)
        for old in self._snapshots()[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self) -> tuple[Snapshot | None, list[str]]:
        """The newest undamaged snapshot, and the names of damaged ones that were passed over for it."""
        damaged: list[str] = []
        for path in reversed(self._snapshots()):
            snapshot = _read(path)
            if snapshot is not None:
                return snapshot, damaged
            damaged.append(path.name)
        return None, damaged

    def clear(self) -> None:
        """Remove the run's folder: its result is out."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _snapshots(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())


def _read(path: Path) -> Snapshot | None:
    try:
        lines = [line.split("  ", 1) for line in (path / _SUMS).read_text("ascii").splitlines()]
        expected = {name: digest for digest, name in lines}
        if set(expected) != {_ARRAYS, _PROGRESS}:
            return None
        if any(sha256(path / name) != digest for name, digest in expected.items()):
            return None
        arrays = cast(dict[str, mx.array], mx.load(str(path / _ARRAYS)))
        mx.eval(arrays)  # read now: the folder may be dropped while it is in use
        return Snapshot(arrays, json.loads((path / _PROGRESS).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
