"""The matrices of each adapted module ↔ an adapter with one rank and one scale.

Other formats give each module a rank and a scale of its own. One adapter holds them exactly: with columns of zeros in A
and rows of zeros in B a smaller rank becomes the largest, and A (c B) = c (A B) moves a factor into B. Where the factor
is no power of two, B is rounded in float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from stages.lora.adapter_files import Saved
from stages.lora.lora_config import LoraConfig
from stages.lora.targets import IN_LAYER


@dataclass(frozen=True)
class Part:
    """The update scale · A B of one module, and of a DoRA its rows' norms `m` (out,).

    A is (in, rank) and B (rank, out); of experts, as mlx-lm has them, (experts, rank, in) and (experts, out, rank).
    """

    a: mx.array
    b: mx.array
    scale: float
    m: mx.array | None = None

    @property
    def is_switch(self) -> bool:
        """True if the module is the same matrix of every expert."""
        return self.a.ndim == 3

    @property
    def rank(self) -> int:
        """The rank, from A's shape."""
        return self.a.shape[1]


def split(saved: Saved) -> dict[str, Part]:
    """The matrices of each adapted module, by the module's name.

    Raises:
        ValueError: tensors of a module are missing or left over, or do not fit one another or the config.
    """
    arrays: dict[str, dict[str, mx.array]] = {}
    for name, array in saved.arrays.items():
        module, _, kind = name.rpartition(".")
        arrays.setdefault(module, {})[kind] = array
    wanted = {"lora_a", "lora_b"} | ({"m"} if saved.config.type == "dora" else set())
    parts = {}
    for module, found in arrays.items():
        if found.keys() != wanted:
            raise ValueError(
                f"{saved.weights_path}: {module} has {', '.join(sorted(found))}, and a {saved.config.type} adapter has "
                f"{', '.join(sorted(wanted))}; take a whole copy of the adapter"
            )
        parts[module] = Part(found["lora_a"], found["lora_b"], saved.config.scale, found.get("m"))
        check(parts[module], module, saved.weights_path)
        if parts[module].rank != saved.config.rank:
            raise ValueError(
                f"{saved.weights_path}: {module} has rank {parts[module].rank}, {saved.config_path.name} says "
                f"{saved.config.rank}; take both files from the same adapter"
            )
    return parts


def check(part: Part, module: str, path: Path) -> None:
    """Raise ValueError if a module's matrices do not fit one another, or hold what is no number."""
    a, b = part.a.shape, part.b.shape
    fits = len(a) == len(b) and ((len(a) == 2 and a[1] == b[0]) or (len(a) == 3 and a[0] == b[0] and a[1] == b[2]))
    if not fits or (part.m is not None and part.m.shape != b[1:]):
        norms = f" and m {part.m.shape}" if part.m is not None else ""
        raise ValueError(f"{path}: {module}: A {a}, B {b}{norms} do not fit together; take a whole copy of the adapter")
    if not all(mx.isfinite(array).all().item() for array in (part.a, part.b, part.m) if array is not None):
        raise ValueError(f"{path}: {module} holds NaN or infinity: its training went wrong; take an earlier adapter")


def join(
    parts: Mapping[str, Part], *, dropout: float, layers: int | None, config_path: Path, weights_path: Path
) -> Saved:
    """One adapter of all parts, linear modules and embeddings; `layers` is how many the base model has, if known."""
    rank = max(part.rank for part in parts.values())
    scale = Counter(part.scale for part in parts.values()).most_common(1)[0][0]
    arrays = {}
    for name, part in parts.items():
        a, b = part.a.astype(mx.float32), part.b.astype(mx.float32)
        b = b if part.scale == scale else b * (part.scale / scale)
        missing = rank - part.rank
        arrays[f"{name}.lora_a"] = mx.pad(a, [(0, 0), (0, missing)]) if missing else a
        arrays[f"{name}.lora_b"] = mx.pad(b, [(0, missing), (0, 0)]) if missing else b
        if part.m is not None:
            arrays[f"{name}.m"] = part.m.astype(mx.float32)
    keys, indices = place(parts, layers)
    kind = "dora" if any(part.m is not None for part in parts.values()) else "lora"
    config = LoraConfig(rank, scale, dropout, keys, indices, kind)
    return Saved(config, dict(sorted(arrays.items())), config_path, weights_path)


def place(names: Iterable[str], count: int | None) -> tuple[tuple[str, ...], int | tuple[int, ...]]:
    """The keys and the layers that name these modules: `layers` is a number where they are the last of `count`."""
    names = sorted(names)
    inside: dict[int, set[str]] = {}
    for name in names:
        if match := IN_LAYER.match(name):
            inside.setdefault(int(match[1]), set()).add(name[match.end() :])
    shared: set[str] = set().union(*inside.values())
    if any(keys != shared for keys in inside.values()):
        return tuple(names), ()
    keys = tuple(sorted(shared | {name for name in names if not IN_LAYER.match(name)}))
    indices = tuple(sorted(inside))
    is_tail = count is not None and indices and indices == tuple(range(count - len(indices), count))
    return keys, len(indices) if is_tail else indices
