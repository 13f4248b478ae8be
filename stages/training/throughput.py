"""Throughput and memory of a training process, for artifacts/timing/train.json."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import mlx.core as mx

from stages.training.progress import Timing


class Throughput:
    """Tokens a second of the updates of this process, which may go on with a run that another began.

    Tokens are the rows' own, prompts included, padding not. The first update is left out: in it, weights are read and
    buffers made. `started` is `time.perf_counter()` as the stage began.
    """

    def __init__(self, started: float) -> None:
        self._started = started
        self._first_update: float | None = None
        self._epochs: dict[int, tuple[int, float]] = {}  # epoch → tokens, seconds

    def add(self, timing: Timing) -> None:
        """Count an update that was just made."""
        if self._first_update is None:
            self._first_update = time.perf_counter()
            return
        tokens, seconds = self._epochs.get(timing.epoch, (0, 0.0))
        self._epochs[timing.epoch] = (tokens + timing.tokens, seconds + timing.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Over all updates but the first."""
        return _rate(*(sum(column) for column in zip(*self._epochs.values(), strict=True))) if self._epochs else 0.0

    def figures(self, *, padded_share: float) -> dict[str, Any]:
        """The content of the timing file. Validation and saving count towards `seconds` alone."""
        by_epoch = [_rate(*self._epochs[epoch]) for epoch in sorted(self._epochs)]
        return {
            "seconds": round(time.perf_counter() - self._started, 3),
            "seconds_to_first_update": round((self._first_update or self._started) - self._started, 3),
            "tokens_per_second": round(self.tokens_per_second, 2),
            "tokens_per_second_by_epoch": [round(rate, 2) for rate in by_epoch],
            "peak_memory_bytes": peak_memory(),
            "padded_share": round(padded_share, 4),
        }


def _rate(tokens: float, seconds: float) -> float:
    return tokens / max(seconds, 1e-9)


def peak_memory() -> int:
    """Bytes that the process took at most: resident, or in MLX's buffers, which a GPU's driver may hold apart."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return max(resident, mx.get_peak_memory())
