"""Options of a small training run."""

from __future__ import annotations

from typing import Any

OPTIONS: dict[str, Any] = {
    "steps": 7,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "weight_decay": 0.01,
    "warmup_steps": 2,
    "steps_per_eval": 3,
    "val_batches": 1,
    "seed": 0,
}
