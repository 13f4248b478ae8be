"""Tensors of a merged model that the adapter does not touch: proven by their bytes."""

from __future__ import annotations

from collections.abc import Collection

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


def first_difference(base: nn.Module, merged: nn.Module, *, touched: Collection[str]) -> str | None:
    """The name of the first tensor outside of the `touched` modules that the two models do not share; None if all do.

    Both models' weights should not have been read yet: they are read, compared and let go one at a time.
    """
    expected, found = (dict(tree_flatten(model.parameters())) for model in (base, merged))
    for name in sorted(expected.keys() | found.keys()):
        if name.rpartition(".")[0] in touched:
            continue
        one, other = expected.pop(name, None), found.pop(name, None)
        if one is None or other is None or not _are_equal(one, other):
            return name
    return None


def _are_equal(one: mx.array, other: mx.array) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool(mx.array_equal(one, other, equal_nan=True))
