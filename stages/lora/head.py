"""The head apart from the backbone: a model's logits of any hidden states, whatever its head does.

Between the last layer's norm and the logits a model may scale, cap, tie or pack: mlx-lm's decoders do so in their own
`__call__`, around that of their backbone (`model.model`). So the head is run by the model itself, with a backbone that
hands out given hidden states: it takes a detour, for which patches.py gives it a subclass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from stages.lora import kernels
from stages.lora.frozen import embedded, fed

Detour = Callable[[Callable[[], mx.array]], mx.array]
_PRODUCT_TOLERANCE = 1e-4  # of the largest logit
_BACKBONES = ("model", "transformer", "backbone")


def is_narrowed(model: nn.Module) -> bool:
    """True if the model's backbone has a detour, which the functions below need."""
    return hasattr(type(backbone_of(model)), "detour")


def hidden_at(model: nn.Module, tokens_BxL: mx.array, positions_N: mx.array) -> mx.array:
    """The hidden states that a narrowed model's head would see at flattened positions, (N, D)."""
    seen: list[mx.array] = []

    def keep(run: Callable[[], mx.array]) -> mx.array:
        hidden_BxLxD = run()
        seen.append(_at(hidden_BxLxD, positions_N, take=kernels.take if kernels.in_use(model) else mx.take))
        return hidden_BxLxD  # the head's part of the graph is never evaluated

    with _on_detour(model, keep):
        model(tokens_BxL)
    return seen[0][0]


def head_logits(model: nn.Module, hidden_NxD: mx.array) -> mx.array:
    """A narrowed model's logits of hidden states, (N, V), in the model's type."""
    with _on_detour(model, lambda run: hidden_NxD[None]):
        logits_1xNxV: mx.array = model(mx.zeros((1, len(hidden_NxD)), dtype=mx.int32))
    return logits_1xNxV[0]


def logits_at(model: nn.Module, tokens_BxL: mx.array, positions_N: mx.array) -> mx.array:
    """The model's logits at flattened positions, (N, V), in the model's type."""
    if not is_narrowed(model):
        return _at(model(tokens_BxL), positions_N)[0]
    with _on_detour(model, lambda run: _at(run(), positions_N)):
        logits_1xNxV: mx.array = model(tokens_BxL)
    return logits_1xNxV[0]


def head_matrix(model: nn.Module) -> mx.array | None:
    """The matrix (V, D) whose product with hidden states a narrowed model's logits are; None if they are more.

    That they are no more was found at the start (see execution.py), of models that use the CPU kernels alone.
    """
    rows = getattr(model, "plain_head_rows", 0)
    module = _head_module(model) if rows else None
    # An adapter on the head may have come since then, and another table be the largest that is left.
    return module.weight if module is not None and len(module.weight) == rows else None


def plain_head_rows(model: nn.Module) -> int:
    """The rows V of the head's matrix, if a narrowed model's logits are no more than its product; 0 if they are."""
    module = _head_module(model)
    if module is None:
        return 0
    matrix_VxD = module.weight
    # Large ones find a cap, small ones a term that is added.
    scales_2x1 = np.array([[0.1], [100.0]], np.float32)
    hidden_2xD = mx.array(scales_2x1 * np.random.default_rng(0).standard_normal((2, matrix_VxD.shape[1])))
    hidden_2xD = hidden_2xD.astype(matrix_VxD.dtype)
    found_2xV, wanted_2xV = hidden_2xD @ matrix_VxD.T, head_logits(model, hidden_2xD)
    if found_2xV.shape != wanted_2xV.shape:
        return 0
    off_2 = mx.abs(found_2xV - wanted_2xV).max(axis=-1) / mx.abs(wanted_2xV).max(axis=-1)
    return len(matrix_VxD) if (off_2 < _PRODUCT_TOLERANCE).all().item() else 0


def _head_module(model: nn.Module) -> Any:
    """The linear module after the backbone, or the embedding where there is none; None if it is more than a matrix."""
    owner = model
    while isinstance(inner := getattr(owner, "language_model", None), nn.Module):
        owner = inner
    module: Any = getattr(owner, "lm_head", None)
    if module is None:
        tables = [child for child in backbone_of(model).children().values() if isinstance(child, nn.Embedding)]
        module = max(tables, key=lambda table: len(table.weight), default=None)
    is_plain = type(module) is nn.Embedding or (type(module) is nn.Linear and "bias" not in module)
    return module if is_plain else None


def head_is_trained(model: nn.Module) -> bool:
    """True if a gradient reaches trainable weights in a narrowed model's head, or in an embedding that is its head."""
    tokens_1x1 = mx.array([[1]])
    with fed(model, embedded(model, len(model.layers) - 1, tokens_1x1)):  # for its shape, of which one layer tells
        hidden_1xD = mx.ones_like(hidden_at(model, tokens_1x1, mx.array([0])))
    _, gradients = nn.value_and_grad(model, lambda model: head_logits(model, hidden_1xD).sum())(model)
    return any(gradient.any().item() for _, gradient in tree_flatten(gradients))


def backbone_of(model: nn.Module) -> Any:
    """The module of embeddings, layers and final norm, of a model of text and more its language model's; or None."""
    while isinstance(inner := getattr(model, "language_model", None), nn.Module):
        model = inner
    found = (getattr(model, name, None) for name in _BACKBONES)
    return next((module for module in found if isinstance(module, nn.Module)), None)


@contextmanager
def _on_detour(model: nn.Module, detour: Detour) -> Iterator[None]:
    backbone = backbone_of(model)
    backbone.detour = detour
    try:
        yield
    finally:
        backbone.detour = None


def _at(values_BxLxD: mx.array, positions_N: mx.array, *, take: Callable[..., mx.array] = mx.take) -> mx.array:
    """(B, L, D) → (1, N, D)."""
    return take(values_BxLxD.reshape(-1, values_BxLxD.shape[-1]), positions_N, axis=0)[None]
