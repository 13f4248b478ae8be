"""The adapter: put onto a model, saved and loaded in mlx-lm's format.

Sources: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685); Kalajdzievski, "A Rank
Stabilization Scaling Factor for Fine-Tuning with LoRA" (arXiv 2312.03732); Liu et al., "DoRA: Weight-Decomposed
Low-Rank Adaptation" (arXiv 2402.09353). The layers are mlx-lm's. `LoRALinear`: y = W x + scale · (dropout(x) A) B, with
A (in, rank) uniform and B (rank, out) zero at the start; `DoRALinear` gives each row of W + scale · (A B)ᵀ a trained
norm `m`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.utils import get_total_parameters

from stages.files.outputs import read_json
from stages.lora.arrays import write_arrays
from stages.lora.targets import chosen, layer_indices, resolve, routers
from stages.model.kinds import LINEAR, SWITCH
from stages.params import schema

WEIGHTS_FILE, CONFIG_FILE = "adapters.safetensors", "adapter_config.json"
Layers = list[tuple[str, nn.Module]]  # an adapter's layers, each with the name of the module that it adapts
IN_LAYER = re.compile(r"^.*?\blayers\.(\d+)\.")  # what stands before a module's path inside of its layer


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


@dataclass(frozen=True)
class Saved:
    """An adapter that was read from files: its shape, its arrays by name, and the files, which messages name."""

    config: LoraConfig
    arrays: dict[str, mx.array]
    config_path: Path
    weights_path: Path


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


def module_names(model: nn.Module, options: schema.Lora) -> list[str]:
    """The names of the modules that these parameters adapt.

    Raises:
        ValueError: the model lacks such layers or modules.
    """
    return _names(model, configure(model, options))


def _names(model: nn.Module, config: LoraConfig) -> list[str]:
    return [name for name, _ in _modules(model, config)]


def _modules(model: nn.Module, config: LoraConfig) -> list[tuple[str, nn.Module]]:
    return chosen(model, config.keys, layers=layer_indices(len(model.layers), config.layers))


def attach(model: nn.Module, config: LoraConfig, *, seed: int) -> list[str]:
    """Put a fresh adapter onto the frozen model; returns the adapted modules' names.

    A's values depend on the seed and on the module's own name, so that another choice of modules changes none of them.

    Raises:
        ValueError: a module is missing, narrower than the rank, or of a kind that `config.type` has no form for.
    """
    found = _modules(model, config)
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
    write(directory, weights(model), config, base=base)


def write(directory: Path, arrays: Mapping[str, mx.array], config: LoraConfig, *, base: str | None = None) -> None:
    """Write an adapter's arrays, sorted by name, and its shape."""
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {name: array.astype(mx.float32) for name, array in arrays.items()}
    write_arrays(directory / WEIGHTS_FILE, arrays)
    keys, count = config.keys, config.layers
    if isinstance(config.layers, tuple):
        # mlx-lm knows the last N layers alone, but takes a module's full name too: name each.
        keys = tuple(dict.fromkeys(name.rpartition(".")[0] for name in arrays))
        count = len(config.layers)
    content = {
        "fine_tune_type": config.type,
        "num_layers": count,
        "lora_parameters": {
            "rank": config.rank,
            "scale": config.scale,
            "dropout": config.dropout,
            "keys": list(keys),
        },
        # What mlx-lm passes over: the same choice of modules as the parameters made it, and the base.
        "lorabuild": {"layers": config.layers, "keys": list(config.keys), "base": base},
    }
    (directory / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")


def read_config(directory: Path) -> LoraConfig:
    """Read an adapter's shape, written here or by any version of mlx-lm.

    In older versions its config had `lora_layers` for `num_layers`, and `use_dora` for the type.

    Raises:
        ValueError: the files are missing or not of this format.
    """
    path = directory / CONFIG_FILE
    content = read_json(path, "make it with: python -m stages.train")
    try:
        lora = content["lora_parameters"]
        kind = content.get("fine_tune_type", "dora" if content.get("use_dora") else "lora")
        keys = lora.get("keys")
        layers = content["num_layers" if "num_layers" in content else "lora_layers"]
        if own := content.get("lorabuild"):
            keys, layers = own["keys"], own["layers"]
        elif keys is None or layers <= 0:
            # To mlx-lm this means all modules or all layers of the base: its tensors tell which these were.
            keys, layers = _read_modules(directory / WEIGHTS_FILE)
        if kind not in ("lora", "dora"):
            raise ValueError(f"{path}: fine_tune_type {kind!r} is no adapter that can be loaded; lora and dora are")
        layers = layers if isinstance(layers, int) else tuple(layers)
        return LoraConfig(lora["rank"], scale_of(content), lora["dropout"], tuple(keys), layers, kind)
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: not an adapter's config ({type(error).__name__}: {error})") from None


def check_base(directory: Path, base: str) -> None:
    """Raise ValueError if an adapter says that it was trained on weights of another identity than `base`."""
    path = directory / CONFIG_FILE
    own = read_json(path, "make it with: python -m stages.train").get("lorabuild")
    trained_on = own.get("base") if isinstance(own, dict) else None
    if trained_on not in (None, base):
        raise ValueError(
            f"{path}: trained on another base model ({str(trained_on)[:12]}, base.json has {base[:12]}); "
            "train it anew, or fetch the base that it was trained on"
        )


def scale_of(content: dict[str, Any]) -> float:
    """The factor on the output in an adapter's config: in older versions of mlx-lm scale · alpha / rank."""
    lora = content["lora_parameters"]
    is_old = "num_layers" not in content and "alpha" in lora
    return lora["scale"] * lora["alpha"] / lora["rank"] if is_old else lora["scale"]


def _read_modules(path: Path) -> tuple[list[str], list[int]]:
    """The keys and the layers that a file's tensors belong to."""
    modules = {name.rpartition(".")[0] for name in read_weights(path)}
    layers = {int(match[1]) for match in map(IN_LAYER.match, modules) if match}
    return sorted({IN_LAYER.sub("", module) for module in modules}), sorted(layers)


def frozen_layers(names: Iterable[str], count: int) -> int:
    """The number of layers, of `count`, below every adapted module; `names` are the adapter's weights or modules.

    The last layer is never among them, adapted or not: what is left to run is a model still.
    """
    names = list(names)
    inside = [int(match[1]) for match in map(IN_LAYER.match, names) if match]
    outside = [name for name in names if not IN_LAYER.match(name)]
    if any("lm_head" not in name for name in outside):  # embeddings, or layers by another name: may be below all
        return 0
    return min([*inside, count - 1])


def saved_names(directory: Path) -> list[str]:
    """The names of a saved adapter's weights.

    Raises:
        ValueError: the file is missing or no adapter's.
    """
    return list(read_weights(directory / WEIGHTS_FILE))


def read(directory: Path) -> Saved:
    """Read a saved adapter; its arrays are read from the disk when they are first used.

    Raises:
        ValueError: the files are missing or not of this format.
    """
    config, weights_path = read_config(directory), directory / WEIGHTS_FILE
    return Saved(config, read_weights(weights_path), directory / CONFIG_FILE, weights_path)


def load(model: nn.Module, directory: Path) -> LoraConfig:
    """Put a saved adapter onto the model; every tensor must fit.

    Raises:
        ValueError: tensors are missing, left over or of another shape; all of them are listed.
    """
    saved = read(directory)
    put(model, saved)
    return saved.config


def put(model: nn.Module, saved: Saved) -> list[str]:
    """Put an adapter that was read onto the model, as `load` does; returns the adapted modules' names."""
    names = attach(model, saved.config, seed=0)
    _load_weights(model, saved)
    return names


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
    if set(_names(model, old)) != set(_names(model, config)):
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


def read_weights(path: Path) -> dict[str, mx.array]:
    """A saved adapter's arrays by name, not read yet.

    Raises:
        ValueError: the file is missing or no safetensors.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file; make it with: python -m stages.train")
    try:
        return cast(dict[str, mx.array], mx.load(str(path)))
    except RuntimeError as error:
        raise ValueError(
            f"{path}: not readable as safetensors ({error}); make it anew: python -m stages.train"
        ) from None


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
