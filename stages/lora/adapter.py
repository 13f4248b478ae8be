"""The adapter on a model: put on, filled from files, taken off.

Sources: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685); Kalajdzievski, "A Rank
Stabilization Scaling Factor for Fine-Tuning with LoRA" (arXiv 2312.03732); Liu et al., "DoRA: Weight-Decomposed
Low-Rank Adaptation" (arXiv 2402.09353). The layers are mlx-lm's. `LoRALinear`: y = W x + scale · (dropout(x) A) B, with
A (in, rank) uniform and B (rank, out) zero at the start; `DoRALinear` gives each row of W + scale · (A B)ᵀ a trained
norm `m`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.utils import get_total_parameters

from stages.lora import adapter_files
from stages.lora.adapter_files import Saved
from stages.lora.lora_config import LoraConfig, configure, modules_of
from stages.lora.targets import IN_LAYER, layer_indices, routers
from stages.model.kinds import LINEAR, SWITCH
from stages.params import schema

Layers = list[tuple[str, nn.Module]]  # an adapter's layers, each with the name of the module that it adapts


def module_names(model: nn.Module, options: schema.Lora) -> list[str]:
    """The names of the modules that these parameters adapt.

    Raises:
        ValueError: the model lacks such layers or modules.
    """
    return [name for name, _ in modules_of(model, configure(model, options))]


def attach(model: nn.Module, config: LoraConfig, *, seed: int) -> list[str]:
    """Put a fresh adapter onto the frozen model; returns the adapted modules' names.

    A's values depend on the seed and on the module's own name, so that another choice of modules changes none of them.

    Raises:
        ValueError: a module is missing, narrower than the rank, or of a kind that `config.type` has no form for.
    """
    found = modules_of(model, config)
    if config.type == "dora":
        _refuse_dora(found)
    # A gate is as wide as there are experts: one rank serves it and its wider neighbours.
    exempt = routers(dict(model.named_modules()))
    adapted = [(name, wrapped(module, config, name=name, seed=seed)) for name, module in found]
    for name, layer in adapted:
        width = _narrowest(layer)
        if config.rank > width and name not in exempt:
            raise ValueError(f"lora.rank: {config.rank} exceeds the width of {name}, {width}")
    model.update_modules(tree_unflatten(adapted))
    return [name for name, _ in adapted]


def _refuse_dora(modules: Sequence[tuple[str, nn.Module]]) -> None:
    without = {IN_LAYER.sub("", name) for name, module in modules if not isinstance(module, LINEAR)}
    if without:
        raise ValueError(
            f"lora.type: dora has no form for switch layers and embeddings ({', '.join(sorted(without))}); "
            "take them out of lora.targets, or set lora.type to lora"
        )


def wrapped(module: nn.Module, config: LoraConfig, *, name: str, seed: int) -> nn.Module:
    """The module inside an adapter layer, A's values set."""
    kinds = {LINEAR: DoRALinear if config.type == "dora" else LoRALinear, SWITCH: LoRASwitchLinear}
    kind = next((kind for classes, kind in kinds.items() if isinstance(module, classes)), LoRAEmbedding)
    layer = kind.from_base(module, r=config.rank, dropout=config.dropout, scale=config.scale)
    shape = layer.lora_a.shape
    if isinstance(module, nn.QuantizedLinear):
        # DoRALinear's own reckoning holds for 2, 4 and 8 bits only.
        shape = (module.weight.shape[1] * 32 // module.bits, config.rank)
    bound = 1 / math.sqrt(shape[-1] if isinstance(module, SWITCH) else shape[0])
    layer.lora_a = mx.random.uniform(-bound, bound, shape, key=_key(seed, name))
    if kind is DoRALinear and not layer.m.all().item():
        raise ValueError(
            f"lora.type: dora divides by the norm of each row, and {name} has a row of zeros; set lora.type to lora"
        )
    return layer


def _narrowest(layer: nn.Module) -> int:
    """The smaller side of the matrix that the layer adapts: no update of a higher rank exists."""
    if isinstance(layer, LoRASwitchLinear):
        return min(layer.lora_a.shape[2], layer.lora_b.shape[1])
    return min(layer.lora_a.shape[0], layer.lora_b.shape[1])


def _key(seed: int, name: str) -> mx.array:
    return mx.random.key(np.random.SeedSequence([seed, *name.encode()]).generate_state(1, np.uint64).item())


def weights(model: nn.Module) -> dict[str, mx.array]:
    """The adapter's arrays by name, sorted."""
    return dict(sorted(tree_flatten(model.trainable_parameters())))


@dataclass(frozen=True)
class Adapted:
    """All adapted modules of one key: in how many layers it is (1 outside of them), and its trainable parameters."""

    key: str
    layers: int
    parameters: int


def summary(model: nn.Module) -> tuple[list[Adapted], int]:
    """The adapted modules by key, and the number of all parameters, base and adapter; a packed weight counts as one."""
    modules: dict[str, dict[str, int]] = {}
    trainable = 0
    for name, array in weights(model).items():
        module = name.rpartition(".")[0]
        sizes = modules.setdefault(IN_LAYER.sub("", module), {})
        sizes[module] = sizes.get(module, 0) + array.size
        trainable += array.size
    groups = [Adapted(key, len(sizes), sum(sizes.values())) for key, sizes in sorted(modules.items())]
    # Adapter layers are no leaves of the module tree: this counts the base alone.
    return groups, get_total_parameters(model) + trainable


def save(directory: Path, model: nn.Module, config: LoraConfig, *, base: str | None = None) -> None:
    """Write the model's adapter as `mlx_lm` reads it; `base` is the identity of the base's weights.

    The same weights give the same bytes.
    """
    adapter_files.write(directory, weights(model), config, base=base)


def load(model: nn.Module, directory: Path) -> LoraConfig:
    """Put a saved adapter onto the model; every tensor must fit.

    Raises:
        ValueError: tensors are missing, left over or of another shape; all of them are listed.
    """
    saved = adapter_files.read(directory)
    put(model, saved)
    return saved.config


def put(model: nn.Module, saved: Saved) -> list[str]:
    """Put an adapter that was read onto the model, as `load` does; returns the adapted modules' names."""
    names = attach(model, saved.config, seed=0)
    _load_weights(model, saved)
    return names


@contextmanager
def stirred(model: nn.Module) -> Iterator[None]:
    """Small random values in place of each B for a while: at first it is zero, and a check would see no adapter."""
    found = [module for module in model.modules() if "lora_b" in module]
    before = [module.lora_b for module in found]
    for i, module in enumerate(found):
        module.lora_b = 0.02 * mx.random.normal(module.lora_b.shape, module.lora_b.dtype, key=mx.random.key(i))
    try:
        yield
    finally:
        for module, lora_b in zip(found, before, strict=True):
            module.lora_b = lora_b


def take_off(model: nn.Module) -> Layers:
    """Take the adapter off the model, which is the base again; returns its layers for `put_on`."""
    kinds = (LoRALinear, DoRALinear, LoRASwitchLinear, LoRAEmbedding)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    bare = [(name, layer.embedding if isinstance(layer, LoRAEmbedding) else layer.linear) for name, layer in layers]
    model.update_modules(tree_unflatten(bare))
    return layers


def put_on(model: nn.Module, layers: Layers) -> None:
    """Put an adapter that `take_off` took from this model back onto it."""
    model.update_modules(tree_unflatten(layers))


def start_from(model: nn.Module, saved: Saved, config: LoraConfig) -> list[str]:
    """Put a saved adapter onto the model to train it on with `config`; returns the adapted modules' names.

    Raises:
        ValueError: type, rank, scale, modules or layers are not those of `config`, or tensors do not fit; one line
            each. Dropout may differ: it belongs to the training and not to the adapter.
    """
    old = saved.config
    pairs: dict[str, tuple[object, object]] = {
        "lora.type": (old.type, config.type),
        "lora.rank": (old.rank, config.rank),
        # Another format may have come to it by other divisions.
        "lora.scale": (old.scale, old.scale if math.isclose(old.scale, config.scale) else config.scale),
    }
    problems = []
    # One choice of modules can be named in several ways.
    if dict(modules_of(model, old)).keys() != dict(modules_of(model, config)).keys():
        if any(IN_LAYER.match(key) for key in old.keys):
            problems += [
                f"{saved.config_path}: names its modules one by one, and they are not those of lora.targets in "
                "lora.layers; choose the same ones, or start from another adapter"
            ]
        else:
            count = len(model.layers)
            pairs["lora.targets"] = (sorted(old.keys), sorted(config.keys))
            pairs["lora.layers"] = (
                list(layer_indices(count, old.layers)),
                list(layer_indices(count, config.layers)),
            )
    problems += [
        f"{saved.config_path}: {name} is {_shown(there)} there and {_shown(here)} here; "
        f"set {name} to {_shown(there)}{' and lora.alpha to null' if name == 'lora.scale' else ''}"
        for name, (there, here) in pairs.items()
        if there != here
    ]
    if problems:
        raise ValueError("\n".join(problems))
    names = attach(model, config, seed=0)
    _load_weights(model, saved)
    return names


def _shown(value: object) -> str:
    """As one would write it in params.yaml."""
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else f"{value}"


def _load_weights(model: nn.Module, adapter: Saved) -> None:
    saved, path = adapter.arrays, adapter.weights_path
    expected = weights(model)
    problems = [f"{name}: missing" for name in expected if name not in saved]
    problems += [f"{name}: not in the model" for name in saved if name not in expected]
    problems += [
        f"{name}: shape {saved[name].shape}, the model wants {array.shape}"
        for name, array in expected.items()
        if name in saved and saved[name].shape != array.shape
    ]
    if problems:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in problems))
    model.load_weights(list(saved.items()), strict=False)
    mx.eval(weights(model))  # read now: the file may be replaced
