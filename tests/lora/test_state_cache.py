"""The cache of states: what is written is read, by any process; damage is noticed; the oldest goes."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from stages.lora.state_cache import _RECORD, StateCache, evict

IDS = [np.arange(start, start + 5, dtype=np.int32) for start in range(20)]


def states(number: int, dtype: Any = mx.float32) -> mx.array:
    return mx.random.normal((5, 8), key=mx.random.key(number)).astype(dtype)


@pytest.fixture
def filled(tmp_path: Path) -> StateCache:
    cache = StateCache(tmp_path / "cache")
    for number, ids in enumerate(IDS[:4]):
        cache.write(ids, states(number))
    return cache


def assert_holds(cache: StateCache, numbers: Any) -> None:
    for number in numbers:
        found = cache.read(IDS[number])
        assert found is not None and mx.array_equal(found, states(number)).item(), number


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_states_come_back_bit_by_bit(tmp_path: Path, dtype: Any) -> None:
    StateCache(tmp_path).write(IDS[0], states(0, dtype))
    found = StateCache(tmp_path).read(IDS[0])
    assert found is not None and found.dtype == dtype
    assert mx.array_equal(found, states(0, dtype)).item()


def test_only_the_very_same_tokens_are_found(filled: StateCache) -> None:
    assert_holds(filled, range(4))
    assert filled.read(IDS[4]) is None
    assert filled.read(IDS[0][:-1]) is None
    assert IDS[1] in filled and IDS[4] not in filled
    assert filled.problem is None


def test_processes_see_each_others_states_and_write_none_twice(filled: StateCache) -> None:
    other = StateCache(filled.folder)
    other.write(IDS[5], states(5))
    assert_holds(filled, [0, 5])
    size = filled.size()
    filled.write(IDS[5], states(5))
    StateCache(filled.folder).write(IDS[0], states(0))
    assert filled.size() == size


def _write_all(folder: Path, seed: int) -> None:
    cache = StateCache(folder)
    for number in np.random.default_rng(seed).permutation(len(IDS)):
        cache.write(IDS[number], states(int(number)))


def test_processes_write_at_the_same_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write_all, args=(tmp_path, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    cache = StateCache(tmp_path)
    assert_holds(cache, range(len(IDS)))
    assert cache.size() == len(IDS) * 5 * 8 * 4


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("offset", [5 * 8 * 4, 2 * 5 * 8 * 4 - 1])
def test_a_flipped_bit_is_noticed_and_mended(filled: StateCache, offset: int) -> None:
    flip(filled.folder / "states.bin", offset)
    cache = StateCache(filled.folder)
    assert cache.read(IDS[1]) is None
    assert "damaged" in (cache.problem or "")
    assert_holds(cache, [0, 2, 3])
    cache.write(IDS[1], states(1))
    assert_holds(StateCache(filled.folder), range(4))


@pytest.mark.parametrize("field", ["rows", "width", "dtype", "offset", "crc"])
def test_a_damaged_record_is_noticed(filled: StateCache, field: str) -> None:
    kind, start = dict(_RECORD.fields or {})[field][:2]
    for byte in range(kind.itemsize):
        place = 2 * _RECORD.itemsize + start + byte
        flip(filled.folder / "index.bin", place)
        cache = StateCache(filled.folder)
        assert cache.read(IDS[2]) is None, byte
        assert_holds(cache, [0, 1, 3])
        flip(filled.folder / "index.bin", place)


def test_a_shorter_file_is_noticed(filled: StateCache) -> None:
    os.truncate(filled.folder / "states.bin", 3 * 5 * 8 * 4 + 10)
    assert_holds(filled, [0, 1, 2])
    assert filled.read(IDS[3]) is None
    filled.write(IDS[3], states(3))
    assert_holds(filled, range(4))


def test_a_writer_killed_in_mid_record_disturbs_nothing(filled: StateCache) -> None:
    with (filled.folder / "index.bin").open("ab") as index:
        index.write(b"part of a record")
    with (filled.folder / "states.bin").open("ab") as file:
        file.write(b"states without one")
    cache = StateCache(filled.folder)
    assert_holds(cache, range(4))
    cache.write(IDS[4], states(4))
    assert_holds(StateCache(filled.folder), range(5))


def test_a_full_disk_ends_the_writing_and_not_the_run(filled: StateCache, monkeypatch: pytest.MonkeyPatch) -> None:
    size = filled.size()

    def full(descriptor: int, content: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        filled.write(IDS[6], states(6))
    assert filled.problem is not None and "No space left" in filled.problem
    assert filled.size() == size and IDS[6] not in filled
    assert_holds(filled, range(4))


@pytest.mark.parametrize("name", ["flock", "pread", "pwrite"])
def test_a_disk_that_fails_ends_the_keeping_and_not_the_run(
    filled: StateCache, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fcntl if name == "flock" else os, name, fail)
    filled.write(IDS[6], states(6))
    assert name == "flock" or filled.read(IDS[0]) is None or name == "pwrite"
    assert filled.problem is not None and "Input/output error" in filled.problem


def test_a_lock_that_cannot_be_had_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    with pytest.raises(OSError, match="No locks"):
        StateCache(tmp_path)
    assert before == 0 or len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_cache_used_longest_ago_goes_first(tmp_path: Path) -> None:
    for age, name in enumerate(["newest", "middle", "oldest", "kept"]):
        cache = StateCache(tmp_path / name)
        cache.write(IDS[0], states(0))
        cache.close()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    in_use = StateCache(tmp_path / "oldest")
    os.utime(tmp_path / "oldest", (1, 1))
    one = sum(path.stat().st_size for path in (tmp_path / "kept").iterdir())
    assert evict(tmp_path, keep=tmp_path / "kept", to=4 * one) == []
    assert evict(tmp_path, keep=tmp_path / "kept", to=3 * one) == ["middle"]
    in_use.close()
    assert evict(tmp_path, keep=tmp_path / "kept", to=0) == ["oldest", "newest"]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_cleared_cache_is_empty_and_works(filled: StateCache) -> None:
    filled.mark_verified()
    filled.clear()
    assert not filled.verified and filled.size() == 0 and filled.read(IDS[0]) is None
    filled.write(IDS[0], states(0))
    assert_holds(StateCache(filled.folder), [0])
