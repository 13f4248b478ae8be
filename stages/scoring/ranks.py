"""Ranks: the processes of one data-parallel run, which share out rows and sum what they computed.

The transport is `mx.distributed`'s, whichever the run was launched with (ring, MPI, JACCL, NCCL). A process that nobody
launched is alone, rank 0 of 1: it gets its own values back, at no cost. On several ranks every method but `shard` is
collective: all ranks must call it, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from stages.files.hashes import digest_of


@dataclass(frozen=True)
class Ranks:
    """This process among the others; `group` is None when it is alone."""

    group: mx.distributed.Group | None = None

    @property
    def rank(self) -> int:
        return self.group.rank() if self.group else 0

    @property
    def size(self) -> int:
        return self.group.size() if self.group else 1

    def shard(self, lengths: Sequence[int]) -> list[int]:
        """This rank's share of rows of these lengths, as ascending indices.

        Rows go round from the longest to the shortest, there and back, so that the ranks get about as many tokens.
        They get as many rows, give or take one: of fewer rows than ranks, some get none.
        """
        longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        turns = [divmod(place, self.size) for place in range(len(lengths))]
        seats = [seat if turn % 2 == 0 else self.size - 1 - seat for turn, seat in turns]
        return sorted(index for index, seat in zip(longest_first, seats, strict=True) if seat == self.rank)

    def gather(self, numbers: Sequence[float]) -> np.ndarray:
        """Each rank's numbers, as many on every rank, in double precision: (ranks, numbers)."""
        own_1xK = np.asarray([numbers], dtype=np.float64)
        if self.group is None:
            return own_1xK
        # As bytes, for the GPU knows no doubles.
        all_bytes = _awaited(mx.distributed.all_gather(mx.array(own_1xK.view(np.uint8)), group=self.group))
        return np.array(all_bytes).view(np.float64)

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Sums over the ranks, in their order and in double precision: the same on every rank."""
        totals: list[float] = self.gather(numbers).sum(axis=0).tolist()
        return totals

    def sum_arrays(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Sums over the ranks of arrays that have the same names, shapes and types on every rank."""
        if self.group is None:
            return dict(arrays)
        # One message, in float32, and whole before it is sent: Metal ends a kernel that waits for another machine.
        arrays = dict(sorted(arrays.items()))
        flat = mx.concatenate([array.astype(mx.float32).reshape(-1) for array in arrays.values()])
        mx.eval(flat)
        total = _awaited(mx.distributed.all_sum(flat, group=self.group))
        ends = np.cumsum([array.size for array in arrays.values()]).tolist()
        parts = zip(arrays.items(), mx.split(total, ends[:-1]), strict=True)
        return {name: part.reshape(array.shape).astype(array.dtype) for (name, array), part in parts}

    def broadcast_arrays(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Rank 0's values on every rank: on machines that round otherwise, equal steps would drift apart."""
        own = arrays if self.rank == 0 else {name: mx.zeros_like(array) for name, array in arrays.items()}
        return self.sum_arrays(own)

    def broadcast_bytes(self, content: bytes) -> bytes:
        """Rank 0's bytes on every rank."""
        if self.group is None:
            return content
        count = int(self.gather([len(content)])[0, 0])
        own = np.frombuffer(content, np.uint8) if self.rank == 0 else np.zeros(count, np.uint8)
        return np.array(_awaited(mx.distributed.all_sum(mx.array(own), group=self.group))).tobytes()

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.gather([0])

    def check_equal(self, parts: Mapping[str, Any]) -> None:
        """Check that every rank works on the same JSON values, before they work.

        Raises:
            ValueError: they do not; one line for each rank that differs from rank 0, on every rank.
        """
        digests_RxP = self.gather([int(digest_of(value)[:12], 16) for value in parts.values()])
        problems = []
        for rank, digests in enumerate(digests_RxP):
            differing = [name for name, same in zip(parts, digests == digests_RxP[0], strict=True) if not same]
            if differing:
                problems.append(f"rank {rank} differs from rank 0 in: {', '.join(differing)}; {_REMEDY}")
        if problems:
            raise ValueError("\n".join(problems))


_REMEDY = "give its machine the same code, packages, params.yaml, artifacts/base.json and data/tokens"
ALONE = Ranks()


def join() -> Ranks:
    """Connect with the other ranks, if a launcher started this process.

    Raises:
        ValueError: they cannot be reached.
    """
    backend = _backend(os.environ)
    if backend is None:
        return ALONE
    try:
        group = mx.distributed.init(strict=True, backend=backend)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the other ranks cannot be reached by {backend}: {error}") from None
    return Ranks(group) if group.size() > 1 else ALONE


def _backend(environment: Mapping[str, str]) -> str | None:
    """The backend that `mlx.launch` or Open MPI's `mpirun` started this process for; None without other processes."""
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "mpi"
    if "MLX_RANK" not in environment:
        return None
    if hosts := environment.get("MLX_HOSTFILE"):
        # For a single process, `mlx.launch` writes an empty list of hosts, which MLX cannot read.
        return "ring" if Path(hosts).read_text(encoding="utf-8").strip() else None
    return "jaccl" if "MLX_IBV_DEVICES" in environment else "nccl"


def _awaited(result: mx.array) -> mx.array:
    """Wait for what the ranks compute together.

    Raises:
        ValueError: one of them is gone.
    """
    try:
        mx.eval(result)
    except RuntimeError as error:
        raise ValueError(f"another rank has ended ({error}); run the same command again") from None
    return result
