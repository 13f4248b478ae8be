"""The head apart from the backbone: a model's logits of any hidden states, whatever its head does.

Between the last layer's norm and the logits a model may scale, cap, tie or pack: mlx-lm's decoders do so in their own
`__call__`, around that of their backbone (`model.model`). So the head is run by the model itself, with a backbone that
hands out given hidden states. The backbone stays the object it is, of a subclass of its kind, and keeps its
parameters' names. A model that this does not hold for is left as it is: slower, and as right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from stages.lora.frozen import embedded, fed

Detour = Callable[[Callable[[], mx.array]], mx.array]
_BACKBONES = ("model", "transformer", "backbone")


def narrow_head(model: nn.Module, *, frozen: int = 0) -> bool:
    """Let the head see chosen positions only, where the model's layout allows; says whether it does.

    The lowest `frozen` layers are not run to find out.
    """
    backbone: Any = _backbone(model)
    if backbone is None or is_narrowed(model):
        return backbone is not None
    kind = type(backbone)
    backbone.__class__ = type(kind.__name__, (kind,), {"__call__": _with_detour(kind), "detour": None})
    if _gives_the_same_logits(model, frozen):
        return True
    backbone.__class__ = kind
    return False


def is_narrowed(model: nn.Module) -> bool:
    return hasattr(type(_backbone(model)), "detour")


def hidden_at(model: nn.Module, tokens_BxL: mx.array, positions_N: mx.array) -> mx.array:
    """What a narrowed model's head would see at flattened positions, (N, D)."""
    seen: list[mx.array] = []

    def keep(run: Callable[[], mx.array]) -> mx.array:
        hidden_BxLxD = run()
        seen.append(_at(hidden_BxLxD, positions_N))
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


def head_is_trained(model: nn.Module) -> bool:
    """Whether a gradient reaches trainable weights in a narrowed model's head, or in an embedding that is its head."""
    tokens_1x1 = mx.array([[1]])
    with fed(model, embedded(model, len(model.layers) - 1, tokens_1x1)):  # for its shape, of which one layer tells
        hidden_1xD = mx.ones_like(hidden_at(model, tokens_1x1, mx.array([0])))
    _, gradients = nn.value_and_grad(model, lambda model: head_logits(model, hidden_1xD).sum())(model)
    return any(gradient.any().item() for _, gradient in tree_flatten(gradients))


def _backbone(model: nn.Module) -> nn.Module | None:
    """Embeddings, layers and final norm; of a model of text and more, those of its language model."""
    while isinstance(inner := getattr(model, "language_model", None), nn.Module):
        model = inner
    found = (getattr(model, name, None) for name in _BACKBONES)
    return next((module for module in found if isinstance(module, nn.Module)), None)


def _with_detour(kind: Any) -> Any:
    plain = kind.__call__

    def call(backbone: Any, *args: Any, **kwargs: Any) -> Any:
        detour: Detour | None = backbone.detour
        if detour is None:
            return plain(backbone, *args, **kwargs)
        return detour(lambda: plain(backbone, *args, **kwargs))

    return call


@contextmanager
def _on_detour(model: nn.Module, detour: Detour) -> Iterator[None]:
    backbone: Any = _backbone(model)
    backbone.detour = detour
    try:
        yield
    finally:
        backbone.detour = None


def _at(values_BxLxD: mx.array, positions_N: mx.array) -> mx.array:
    """(B, L, D) → (1, N, D)."""
    return values_BxLxD.reshape(1, -1, values_BxLxD.shape[-1])[:, positions_N]


def _gives_the_same_logits(model: nn.Module, frozen: int) -> bool:
    """Whether the head, by itself and behind the backbone, gives the plain model's logits, on four tokens."""
    tokens_1xL, positions_N = mx.array([[1, 2, 3, 4]]), mx.array([1, 3])
    with fed(model, embedded(model, frozen, tokens_1xL)):
        plain_NxV = model(tokens_1xL)[0, positions_N]
        try:
            narrow_NxV = logits_at(model, tokens_1xL, positions_N)
            apart_NxV = head_logits(model, hidden_at(model, tokens_1xL, positions_N))
        except Exception:  # whatever an unknown model trips over
            return False
    return all(
        found.shape == plain_NxV.shape and bool(mx.allclose(plain_NxV, found, rtol=1e-2, atol=1e-2).item())
        for found in (narrow_NxV, apart_NxV)
    )
