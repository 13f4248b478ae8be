"""Speed and memory of a training process, for artifacts/timing/train.json."""

from __future__ import annotations

import resource
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.training.loop import Trainer


class Clock:
    """Of this process, which may take up a run where another left it. Tokens are the rows' own, prompts included."""

    def __init__(self, started: float) -> None:
        self.started = started  # time.perf_counter() as the stage began
        self.first_update: float | None = None

    def rate(self, trainer: Trainer) -> float:
        """Tokens a second, the first update left out: in it, weights are read and buffers made."""
        if self.first_update is None and trainer.pace:
            self.first_update = time.perf_counter()
        return _rate(trainer.pace[1:])

    def figures(self, trainer: Trainer) -> dict[str, Any]:
        """Validation and saving count towards `seconds` alone."""
        epochs = sorted({pace.epoch for pace in trainer.pace})
        by_epoch = [_rate([pace for pace in trainer.pace if pace.epoch == epoch]) for epoch in epochs]
        return {
            "seconds": round(time.perf_counter() - self.started, 3),
            "seconds_to_first_update": round((self.first_update or self.started) - self.started, 3),
            "tokens_per_second": round(self.rate(trainer), 2),
            "tokens_per_second_by_epoch": [round(rate, 2) for rate in by_epoch],
            "peak_memory_bytes": peak_memory(),
            "padded_share": round(trainer.progress.total.padded_share, 4),
        }


def _rate(paces: Any) -> float:
    return sum(pace.tokens for pace in paces) / max(sum(pace.seconds for pace in paces), 1e-9)


def peak_memory() -> int:
    """Bytes that the process took at most: resident, or in MLX's buffers, which a GPU's driver may hold apart."""
    import mlx.core as mx

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return max(resident, mx.get_peak_memory())
