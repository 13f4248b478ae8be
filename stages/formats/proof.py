"""The proof of a conversion: what was written, read back, is the adapter."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from stages.adapters.parts import Part, split
from stages.lora.adapter_files import Saved

# A factor moved into B rounds it once, and once more when it is read: 2⁻²⁴ each, of |A| |B| at most.
_ROUNDING = 2.0**-22
_SMALLEST = 1e-37  # near the smallest float32, numbers have fewer digits
_ROWS = 256  # of an update at a time: the whole of one can be larger than the model's layer


@dataclass(frozen=True)
class Proof:
    """How many modules were compared, and whether every number is the same or equal within float32's rounding."""

    modules: int
    is_exact: bool

    def __str__(self) -> str:
        same = "every number is the same" if self.is_exact else "every update is the same within float32's rounding"
        return f"{self.modules} modules, read back: {same}"


def compare(adapter: Saved, back: Saved) -> Proof:
    """Compare two adapters: the update scale · A B of every module, and DoRA's norms.

    Raises:
        ValueError: modules, types or numbers differ; the first of them is named.
    """
    ours, theirs = split(adapter), split(back)
    if ours.keys() != theirs.keys():
        name = min(ours.keys() ^ theirs.keys())
        raise ValueError(
            f"{adapter.weights_path}: written and read back, {name} is {'missing' if name in ours else 'new'}"
        )
    differing = [name for name in ours if not _is_same(ours[name], theirs[name])]
    for name in differing:
        if not _is_close(ours[name], theirs[name]):
            raise ValueError(
                f"{adapter.weights_path}: written and read back, the update of {name} is another than the "
                "adapter's, so nothing is written; please report this with the adapter's config"
            )
    return Proof(len(ours), not differing)


def _is_same(one: Part, other: Part) -> bool:
    arrays = [(one.a, other.a), (one.b, other.b), (one.m, other.m)]
    return np.float32(one.scale) == np.float32(other.scale) and all(_is_equal(*pair) for pair in arrays)


def _is_equal(one: mx.array | None, other: mx.array | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and bool(mx.array_equal(one.astype(mx.float32), other.astype(mx.float32)))


def _is_close(one: Part, other: Part) -> bool:
    """True if the updates are equal within rounding, a block of rows at a time."""
    if one.is_switch or other.is_switch or not _is_equal(one.m, other.m):
        return False
    pairs = [(_wide(part.a), part.scale * _wide(part.b)) for part in (one, other)]
    (a, b), (c, d) = pairs
    if (len(a), b.shape[1]) != (len(c), d.shape[1]):
        return False
    for start in range(0, len(a), _ROWS):
        rows = slice(start, start + _ROWS)
        allowed = _ROUNDING * (np.abs(a[rows]) @ np.abs(b)) + _SMALLEST
        if not np.all(np.abs(a[rows] @ b - c[rows] @ d) <= allowed):
            return False
    return True


def _wide(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)
