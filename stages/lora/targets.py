"""The modules that an adapter is put on: `lora.targets` and `lora.layers` → module names.

A key is a module's path inside a layer (`self_attn.q_proj`) or, outside the layers, its full name (`lm_head`), as
mlx-lm has them in `adapter_config.json`.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence

import mlx.nn as nn

from stages.model.kinds import EMBEDDING, LINEAR, SWITCH

ALL_LINEAR = "all-linear"
IN_LAYER = re.compile(r"^.*?\blayers\.(\d+)\.")  # what stands before a module's path inside of its layer


def layer_indices(count: int, layers: int | str | Sequence[int]) -> tuple[int, ...]:
    """The indices of the chosen layers of `count`, in order: the last N, "all", or the listed ones.

    Raises:
        ValueError: the model has fewer layers.
    """
    if isinstance(layers, str):
        return tuple(range(count))
    if isinstance(layers, int):
        if layers > count:
            raise ValueError(f"lora.layers: {layers} layers wanted, the base model has {count}")
        return tuple(range(count - layers, count))
    beyond = [index for index in layers if index >= count]
    if beyond:
        raise ValueError(
            f"lora.layers: {', '.join(map(str, beyond))} wanted, the base model has the layers 0 to {count - 1}"
        )
    return tuple(sorted(layers))


def resolve(model: nn.Module, targets: Sequence[str], *, layers: Sequence[int]) -> tuple[str, ...]:
    """The keys that `targets` name, sorted.

    Inside the layers a target is a path, its last parts, a glob of either, or `all-linear`. Outside of them it is a
    module's full name or its last parts alone: embeddings and heads are large, so no pattern takes them along.

    Raises:
        ValueError: some targets name nothing; all of these are in the message.
    """
    inside = {
        path: module
        for index in layers
        for path, module in model.layers[index].named_modules()
        if isinstance(module, LINEAR + SWITCH)
    }
    outside = outside_layers(model)
    keys: set[str] = set()
    unmatched = []
    for target in targets:
        found = {path for path in inside if target == ALL_LINEAR or fnmatch.filter(_tails(path), target)}
        found |= {name for name in outside if target in _tails(name)}
        keys |= found
        if not found:
            unmatched.append(target)
    if unmatched:
        raise ValueError(_explain(unmatched, inside, outside))
    return tuple(sorted(keys))


def _tails(path: str) -> list[str]:
    """The path, and what is left of it without its first, second, … part."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _explain(unmatched: Sequence[str], inside: Iterable[str], outside: Iterable[str]) -> str:
    known = {tail for path in [*inside, *outside] for tail in _tails(path)}
    known |= {f"{path.rpartition('.')[0]}.*" for path in inside if "." in path}
    near = [match for target in unmatched for match in difflib.get_close_matches(target, sorted(known), n=1)]
    hint = f"did you mean {', '.join(map(repr, dict.fromkeys(near)))}? " if near else ""
    verb = "is no linear module" if len(unmatched) == 1 else "are no linear modules"
    return (
        f"lora.targets: {', '.join(map(repr, unmatched))} {verb} of a layer, nor named outside; {hint}"
        f"There are: {', '.join(sorted(inside))}; outside the layers: {', '.join(sorted(outside)) or 'none'}"
    )


def outside_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear modules and embeddings outside of the layers, by name."""
    within = {id(module) for layer in model.layers for module in layer.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) not in within and isinstance(module, LINEAR + EMBEDDING)
    }


def chosen(model: nn.Module, keys: Sequence[str], *, layers: Sequence[int]) -> list[tuple[str, nn.Module]]:
    """Full names and modules of `keys`: layer after layer, then those that keys name in full.

    Not every layer need have every key.

    Raises:
        ValueError: a key names no module.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found, used = [], set()
    for index in layers:
        modules = dict(model.layers[index].named_modules())
        present = [key for key in keys if key in modules]
        found += [(names[id(modules[key])], modules[key]) for key in present]
        used |= set(present)
    named = {name: module for name, module in model.named_modules() if isinstance(module, LINEAR + SWITCH + EMBEDDING)}
    full = [key for key in keys if key not in used and key in named]
    found += [(key, named[key]) for key in full]
    missing = [key for key in keys if key not in used and key not in full]
    if missing:
        raise ValueError(f"the base model has no {', '.join(missing)} to put the adapter on; is it another base?")
    return found


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


def routers(modules: Mapping[str, nn.Module]) -> set[str]:
    """Names of the gates that choose experts: linear modules beside the experts' switch layers."""
    beside = {
        name.rsplit(".", depth)[0] for name, module in modules.items() if isinstance(module, SWITCH) for depth in (1, 2)
    }
    return {
        name for name, module in modules.items() if isinstance(module, LINEAR) and name.rpartition(".")[0] in beside
    }
