"""Several adapters of one base as one: the weighted sum of their updates.

An update is scale · A B. The sum of several is again of that form: their A side by side and their B, weighted, below
each other, so the rank is the sum of the ranks and nothing is lost. (Adding up the A and the B by themselves, as some
tools' "linear" combination does, gives another matrix than the sum.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.lora import LoRASwitchLinear

from stages.lora import adapter, adapter_files
from stages.lora.lora_config import LoraConfig


@dataclass(frozen=True)
class Part:
    """An adapter's folder, and the factor on its update."""

    folder: Path
    weight: float = 1.0


def names_of(parts: Sequence[Part]) -> list[str]:
    """The names of all parts' weights.

    Raises:
        ValueError: a file is missing or no adapter's.
    """
    return sorted({name for part in parts for name in adapter_files.saved_names(part.folder)})


def load_sum(model: nn.Module, parts: Sequence[Part]) -> None:
    """Put the sum of some adapters onto the model.

    Raises:
        ValueError: a part does not fit the model, or is a DoRA, which has no sum with another.
    """
    if len(parts) == 1 and parts[0].weight == 1:
        adapter.load(model, parts[0].folder)
        return
    updates: dict[str, list[tuple[mx.array, mx.array]]] = {}
    for part in parts:
        config = adapter_files.read_config(part.folder)
        if config.type == "dora":
            raise ValueError(
                f"{part.folder}: a DoRA adapter scales the rows of the whole weight, so it has no sum with another; "
                "merge it alone, with a weight of 1"
            )
        for name, (a, b) in _matrices(model, part.folder).items():
            updates.setdefault(name, []).append((a, part.weight * config.scale * b))
    modules = dict(model.named_modules())
    model.update_modules(tree_unflatten([(name, _summed(modules[name], name, all_)) for name, all_ in updates.items()]))
    mx.eval(adapter.weights(model))


def _matrices(model: nn.Module, folder: Path) -> dict[str, tuple[mx.array, mx.array]]:
    """The A and B of each module of a saved adapter, whose shapes were seen to fit the model.

    The adapter is put onto the model for that, and taken off.
    """
    adapter.load(model, folder)
    weights = adapter.weights(model)
    names = sorted({name.rpartition(".")[0] for name in weights})
    found = {name: (weights[f"{name}.lora_a"], weights[f"{name}.lora_b"]) for name in names}
    adapter.take_off(model)
    return found


def _summed(module: nn.Module, name: str, updates: Sequence[tuple[mx.array, mx.array]]) -> nn.Module:
    config = LoraConfig(rank=1, scale=1.0, dropout=0.0, keys=(), layers=0, type="lora")
    layer = adapter.wrapped(module, config, name=name, seed=0)
    # A is (in, rank) and B (rank, out), of experts A (experts, rank, in) and B (experts, out, rank).
    of_a, of_b = (-2, -1) if isinstance(layer, LoRASwitchLinear) else (-1, -2)
    layer.lora_a = mx.concatenate([a.astype(mx.float32) for a, _ in updates], axis=of_a)
    layer.lora_b = mx.concatenate([b.astype(mx.float32) for _, b in updates], axis=of_b)
    return layer
