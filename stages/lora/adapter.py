"""The LoRA adapter: put onto a model, saved and loaded in mlx-lm's format.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). The layer is mlx-lm's
`LoRALinear`: y = W x + scale · (dropout(x) A) B, with A (in, rank) uniform and B (rank, out) zero at the start.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

WEIGHTS_FILE, CONFIG_FILE = "adapters.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class LoraConfig:
    """What shapes an adapter: `keys` are module paths inside a layer (`self_attn.q_proj`) of the last `layers`."""

    rank: int
    scale: float
    dropout: float
    keys: tuple[str, ...]
    layers: int


def resolve(model: nn.Module, targets: Sequence[str], *, layers: int) -> tuple[str, ...]:
    """The module paths inside a layer that `targets` name, by full path or by last part.

    Raises:
        ValueError: the model has fewer layers, or a target names none of its linear modules.
    """
    if layers > len(model.layers):
        raise ValueError(f"lora.layers: {layers} layers wanted, the base model has {len(model.layers)}")
    linear = {
        name
        for layer in model.layers[-layers:]
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear | nn.QuantizedLinear)
    }
    keys: set[str] = set()
    for target in targets:
        found = {name for name in linear if name == target or name.endswith(f".{target}")}
        if not found:
            near = difflib.get_close_matches(target, [*linear, *(name.split(".")[-1] for name in linear)], n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"lora.targets: {target!r} is no linear module of a layer; {hint}There are: {', '.join(sorted(linear))}"
            )
        keys |= found
    return tuple(sorted(keys))


def attach(model: nn.Module, config: LoraConfig, *, seed: int) -> list[str]:
    """Put a fresh adapter onto the frozen model; returns the adapted modules' names.

    A's values depend on the seed and on the module's own name, so that another choice of modules changes none of them.
    """
    adapted: list[tuple[str, nn.Module]] = []
    first = len(model.layers) - config.layers
    names = {id(module): name for name, module in model.named_modules()}
    for layer in model.layers[first:]:
        modules = dict(layer.named_modules())
        for key in config.keys:
            linear = modules[key]
            lora = LoRALinear.from_base(linear, r=config.rank, dropout=config.dropout, scale=config.scale)
            width, rank = lora.lora_a.shape
            if rank > min(width, lora.lora_b.shape[1]):
                raise ValueError(
                    f"lora.rank: {rank} exceeds the width of {names[id(linear)]}, {min(width, lora.lora_b.shape[1])}"
                )
            bound = 1 / math.sqrt(width)
            lora.lora_a = mx.random.uniform(-bound, bound, (width, rank), key=_key(seed, names[id(linear)]))
            adapted.append((names[id(linear)], lora))
    model.update_modules(tree_unflatten(adapted))
    return [name for name, _ in adapted]


def _key(seed: int, name: str) -> mx.array:
    return mx.random.key(np.random.SeedSequence([seed, *name.encode()]).generate_state(1, np.uint64).item())


def weights(model: nn.Module) -> dict[str, mx.array]:
    """The adapter's arrays by name, sorted."""
    return dict(sorted(tree_flatten(model.trainable_parameters())))


def save(directory: Path, model: nn.Module, config: LoraConfig) -> None:
    """Write the adapter as `mlx_lm` reads it. The same weights give the same bytes."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.array(array.astype(mx.float32)) for name, array in weights(model).items()}
    path = directory / WEIGHTS_FILE
    save_file(arrays, path, metadata={"format": "mlx"})
    path.chmod(0o644)
    content = {
        "fine_tune_type": "lora",
        "num_layers": config.layers,
        "lora_parameters": {
            "rank": config.rank,
            "scale": config.scale,
            "dropout": config.dropout,
            "keys": list(config.keys),
        },
    }
    (directory / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")


def read_config(directory: Path) -> LoraConfig:
    """Read an adapter's shape.

    Raises:
        ValueError: the files are missing or not of this format.
    """
    path = directory / CONFIG_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        lora = content["lora_parameters"]
        return LoraConfig(lora["rank"], lora["scale"], lora["dropout"], tuple(lora["keys"]), content["num_layers"])
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; make it with: python -m stages.train") from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not an adapter's config ({type(error).__name__}: {error})") from None


def load(model: nn.Module, directory: Path) -> LoraConfig:
    """Put a saved adapter onto the model; every tensor must fit.

    Raises:
        ValueError: tensors are missing, left over or of another shape; all of them are listed.
    """
    config = read_config(directory)
    attach(model, config, seed=0)
    saved = cast(dict[str, mx.array], mx.load(str(directory / WEIGHTS_FILE)))
    expected = weights(model)
    problems = [f"{name}: missing" for name in expected if name not in saved]
    problems += [f"{name}: not in the model" for name in saved if name not in expected]
    problems += [
        f"{name}: shape {saved[name].shape}, the model wants {array.shape}"
        for name, array in expected.items()
        if name in saved and saved[name].shape != array.shape
    ]
    if problems:
        raise ValueError("\n".join(f"{directory / WEIGHTS_FILE}: {problem}" for problem in problems))
    model.load_weights(list(saved.items()), strict=False)
    mx.eval(model.parameters())
    return config
