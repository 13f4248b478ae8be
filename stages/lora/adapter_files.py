"""An adapter's files in mlx-lm's format: `adapters.safetensors` and `adapter_config.json`, written and read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from stages.files.outputs import read_json
from stages.lora.arrays import write_arrays
from stages.lora.lora_config import LoraConfig
from stages.lora.targets import IN_LAYER
from stages.model.arrays import read_arrays

WEIGHTS_FILE, CONFIG_FILE = "adapters.safetensors", "adapter_config.json"
_HINT = "make it with: python -m stages.train"


@dataclass(frozen=True)
class Saved:
    """An adapter that was read from files: its shape, its arrays by name, and the files, which messages name."""

    config: LoraConfig
    arrays: dict[str, mx.array]
    config_path: Path
    weights_path: Path


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
    content = read_json(path, _HINT)
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
    own = read_json(path, _HINT).get("lorabuild")
    trained_on = own.get("base") if isinstance(own, dict) else None  # other programs' adapters do not say
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


def read_weights(path: Path) -> dict[str, mx.array]:
    """A saved adapter's arrays by name, not read yet.

    Raises:
        ValueError: the file is missing or no safetensors.
    """
    return read_arrays(path, _HINT)
