"""A cache of rows' states on disk, shared by all runs on a machine: found by token ids, checked by checksum.

A folder holds the states of one base cut at one layer: `states.bin`, row after row as the model's floats, and
`index.bin`, a record for each. Both only ever grow, so that several processes may read and write at once, and one that
is killed leaves at worst states without a record. Read with pread rather than through a mapping: a file that shrinks
under a mapping would kill the process. Over the size limit the folders that were used longest ago go.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

_STATES, _INDEX, _VERIFIED = "states.bin", "index.bin", "verified"
_RECORD = np.dtype(
    [("key", "V16"), ("rows", "<u4"), ("width", "<u4"), ("dtype", "<u4"), ("crc", "<u4"), ("offset", "<u8")]
)
_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
_WORDS = {4: (mx.uint32, np.uint32), 2: (mx.uint16, np.uint16)}  # NumPy has no bfloat16: states travel as plain bits


class StateCache:
    """The states in one folder. `problem` tells of the last thing that went wrong on the way: none is fatal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problem: str | None = None
        self._open()

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._full = False
        self._records: dict[bytes, np.void] = {}
        self._seen = 0  # bytes of the index
        flags = os.O_RDWR | os.O_CREAT
        self._states, self._index = (os.open(self.folder / name, flags, 0o666) for name in (_STATES, _INDEX))
        try:
            fcntl.flock(self._index, fcntl.LOCK_SH)  # in use: `evict` passes it over
            os.utime(self.folder)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._states)
        os.close(self._index)

    def clear(self) -> None:
        """Forget everything. Processes that have the old files open go on with them."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._open()

    @property
    def verified(self) -> bool:
        """True if the model was seen to give the same logits from states of this folder."""
        return (self.folder / _VERIFIED).exists()

    def mark_verified(self) -> None:
        """Say so to later processes."""
        with suppress(OSError):  # another process may have cleared the folder
            (self.folder / _VERIFIED).touch()

    def __contains__(self, ids_L: np.ndarray) -> bool:
        key = _key(ids_L)
        if key not in self._records:
            self._read_index()
        return key in self._records

    def read(self, ids_L: np.ndarray) -> mx.array | None:
        """The states of these token ids, (L, D); None if they are not there, or not as they were written."""
        try:
            return self._read(ids_L) if ids_L in self else None
        except OSError as error:
            self._give_up(error)
            return None

    def _read(self, ids_L: np.ndarray) -> mx.array | None:
        record = self._records[_key(ids_L)]
        rows, width, kind, offset = (int(record[name]) for name in ("rows", "width", "dtype", "offset"))
        dtype = _DTYPES[kind % len(_DTYPES)]
        size = rows * width * dtype.size
        # The sizes are looked at first: a damaged record may name any.
        if rows == len(ids_L) and offset + size <= self.size():
            content = os.pread(self._states, size, offset)
            if len(content) == size and _checksum(record, content) == record["crc"]:
                return mx.array(np.frombuffer(content, _WORDS[dtype.size][1]).reshape(rows, width)).view(dtype)
        self.problem = f"{self.folder / _STATES} was damaged; what it held for a row is computed anew"
        del self._records[_key(ids_L)]
        return None

    def write(self, ids_L: np.ndarray, states_LxD: mx.array) -> None:
        """Append the states of these token ids. Where that fails (a full disk), no more are kept."""
        if self._full:
            return
        content = np.array(states_LxD.view(_WORDS[states_LxD.dtype.size][0])).tobytes()
        record = np.zeros((), _RECORD)
        record["key"] = np.void(_key(ids_L))
        record["rows"], record["width"] = states_LxD.shape
        record["dtype"] = _DTYPES.index(states_LxD.dtype)
        record["crc"] = _checksum(record, content)
        try:
            with _locked(self._states):
                if ids_L not in self:  # or another process was first
                    self._append(record, content)
            self._read_index()
        except OSError as error:
            self._give_up(error)

    def _append(self, record: Any, content: bytes) -> None:
        end = record["offset"] = self.size()
        try:
            _write(self._states, content, end)
            # A writer that was killed may have left a part of a record: this one begins where that did.
            index_end = os.fstat(self._index).st_size
            _write(self._index, record.tobytes(), index_end - index_end % _RECORD.itemsize)
        except OSError:
            os.ftruncate(self._states, end)
            raise

    def _give_up(self, error: OSError) -> None:
        self.problem = f"no more output of frozen layers is kept: {self.folder}: {error.strerror}"
        self._full = True

    def size(self) -> int:
        """Bytes of the states."""
        return os.fstat(self._states).st_size

    def _read_index(self) -> None:
        """Take in the records that were added since, by this process or another."""
        content = os.pread(self._index, max(os.fstat(self._index).st_size - self._seen, 0), self._seen)
        count = len(content) // _RECORD.itemsize
        self._records |= {record["key"].tobytes(): record for record in np.frombuffer(content, _RECORD, count=count)}
        self._seen += count * _RECORD.itemsize


def evict(root: Path, *, keep: Path, to: int) -> list[str]:
    """Remove folders of `root` that no process uses, the one used longest ago first, until they take `to` bytes.

    `keep` stays. Returns the names of the removed ones.
    """
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    sizes = {path: _folder_size(path) for path in folders}
    removed = []
    for path in sorted(set(folders) - {keep}, key=_last_used):
        if sum(sizes.values()) <= to:
            break
        if _is_unused(path):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path.name)
            del sizes[path]
    return removed


def _folder_size(folder: Path) -> int:
    with suppress(FileNotFoundError):  # another process may be evicting the same
        return sum(path.stat().st_size for path in folder.iterdir())
    return 0


def _last_used(folder: Path) -> float:
    with suppress(FileNotFoundError):
        return folder.stat().st_mtime
    return 0.0


def _is_unused(folder: Path) -> bool:
    """True if no process has this folder open."""
    try:
        with (folder / _INDEX).open("rb") as index:
            fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _key(ids_L: np.ndarray) -> bytes:
    return blake2b(ids_L.astype(np.int32).tobytes(), digest_size=16).digest()


def _checksum(record: Any, content: bytes) -> int:
    """Of the states and of what says how to read them."""
    head = b"".join(record[name].tobytes() for name in ("key", "rows", "width", "dtype"))
    return zlib.crc32(content, zlib.crc32(head))


@contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _write(descriptor: int, content: bytes, offset: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, memoryview(content)[done:], offset + done)
