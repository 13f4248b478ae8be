"""Optimizers of `mlx.optimizers`, over parameters in a flat dictionary, and the learning rate of each update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import mlx.core as mx
import mlx.optimizers as optim

OptimizerName = Literal["adamw", "adam", "sgd", "adafactor", "lion", "muon"]
ScheduleName = Literal["constant", "linear", "cosine"]


def make_optimizer(
    name: OptimizerName, *, betas: tuple[float, float], weight_decay: float, bias_correction: bool = True
) -> Any:
    """The optimizer; its learning rate is set anew before each update. `betas[0]` is the momentum of sgd and muon.

    Adam and AdamW were published with the correction of their moments. MLX's default leaves it out, and the first
    updates are other then.
    """
    rate = 0.0
    if name == "adamw":
        return optim.AdamW(rate, betas=list(betas), weight_decay=weight_decay, bias_correction=bias_correction)
    if name == "adam":
        return optim.Adam(rate, betas=list(betas), bias_correction=bias_correction)
    if name == "sgd":
        return optim.SGD(rate, momentum=betas[0], weight_decay=weight_decay)
    if name == "adafactor":
        return optim.Adafactor(
            rate, beta_1=None, weight_decay=weight_decay, relative_step=False, scale_parameter=False, warmup_init=False
        )
    if name == "lion":
        return optim.Lion(rate, betas=list(betas), weight_decay=weight_decay)
    return optim.Muon(rate, momentum=betas[0], weight_decay=weight_decay)


def learning_rate(
    step: int, *, peak: float, schedule: ScheduleName, warmup_steps: int, steps: int, final: float
) -> float:
    """The learning rate of update number `step`, counted from 1, of `steps`.

    It rises linearly to `peak` over the first `warmup_steps` updates, and then stays, or falls to `final`, which the
    update after the last would have.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    done = (step - 1 - warmup_steps) / max(steps - warmup_steps, 1)
    left = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return final + (peak - final) * left


def flat_state(optimizer: Any) -> dict[str, mx.array]:
    """An optimizer's state as arrays by name: `step`, and `NAME OF PARAMETER|NAME OF MOMENT`."""
    arrays: dict[str, mx.array] = {}
    for name, value in optimizer.state.items():
        if isinstance(value, Mapping):
            arrays |= {f"{name}|{moment}": array for moment, array in value.items()}
        else:
            arrays[name] = value
    return arrays


def restore_state(optimizer: Any, arrays: Mapping[str, mx.array]) -> None:
    """Undo `flat_state`."""
    state: dict[str, Any] = {}
    for name, array in arrays.items():
        parameter, bar, moment = name.partition("|")
        if bar:
            state.setdefault(parameter, {})[moment] = array
        else:
            state[name] = array
    optimizer.state = state
