"""The shape of an adapter: the `lora` section of the parameters, made definite for a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import mlx.nn as nn

from stages.lora.targets import chosen, layer_indices, resolve
from stages.params import schema


@dataclass(frozen=True)
class LoraConfig:
    """The shape of an adapter.

    `keys` are module paths inside a layer (`self_attn.q_proj`) and full names of modules (`lm_head`); `layers` the last
    N, or a tuple of indices. An adapter whose layers do not all have the same modules names each in full.
    """

    rank: int
    scale: float
    dropout: float
    keys: tuple[str, ...]
    layers: int | tuple[int, ...]
    type: str  # "lora" or "dora"


def scaling(options: schema.Lora) -> float:
    """The factor on the adapter's output: `scale` itself, or alpha over the rank or over its square root."""
    if options.alpha is None:
        return cast(float, options.scale)
    return options.alpha / (math.sqrt(options.rank) if options.rank_stabilized else options.rank)


def configure(model: nn.Module, options: schema.Lora) -> LoraConfig:
    """The `lora` section of the parameters, made definite for this model.

    Raises:
        ValueError: the model lacks such layers or modules.
    """
    count = len(model.layers)
    indices = layer_indices(count, options.layers)
    is_tail = indices == tuple(range(count - len(indices), count))
    return LoraConfig(
        rank=options.rank,
        scale=scaling(options),
        dropout=options.dropout,
        keys=resolve(model, options.targets, layers=indices),
        layers=len(indices) if is_tail else indices,
        type=options.type,
    )


def modules_of(model: nn.Module, config: LoraConfig) -> list[tuple[str, nn.Module]]:
    """Full names and modules that an adapter of this shape goes onto."""
    return chosen(model, config.keys, layers=layer_indices(len(model.layers), config.layers))
