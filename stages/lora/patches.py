"""Classes of a model's modules, replaced: the code of one model sees other functions than MLX's own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import activations
from mlx_lm.models import base as mlx_lm_base

from stages.lora.batches import collate
from stages.lora.frozen import States, embedded, fed
from stages.lora.kernels import (
    Namespace,
    attention,
    fast_attention,
    gelu_approx,
    rms_norm,
    rope,
    silu,
    softmax,
    swiglu,
    tanh,
)
from stages.tokens.row import TokenRow

# How far logits and gradient may be from MLX's: the norm of the difference by the norm.
TOLERANCE = 1e-3
_COMPARED_TOKENS = 64  # of a row

_REPLACED: dict[str, tuple[Any, Any]] = {
    "swiglu": (activations.swiglu, swiglu),
    "silu": (nn.silu, silu),
    "gelu_approx": (nn.gelu_approx, gelu_approx),
    "scaled_dot_product_attention": (mlx_lm_base.scaled_dot_product_attention, attention),
    "nn": (nn, Namespace(nn, silu=silu, gelu_approx=gelu_approx)),
    "mx": (
        mx,
        Namespace(
            mx,
            softmax=softmax,
            tanh=tanh,
            fast=Namespace(mx.fast, scaled_dot_product_attention=fast_attention, rms_norm=rms_norm, rope=rope),
        ),
    ),
}


_USED = {"swiglu", "silu", "gelu_approx", "softmax", "tanh", "scaled_dot_product_attention", "rms_norm", "rope"}


def install(model: nn.Module, rows: Sequence[TokenRow], *, frozen: int = 0) -> str | None:
    """Let a model use the functions above, if it then gives the same logits and gradients on the first two rows.

    Gradients are compared of what is trainable, so an adapter is attached before. The lowest `frozen` layers are not
    run for this where those above are of the same kinds: their weights may never be needed. Returns why the model was
    left as it was, or None; on a GPU, where there is nothing to gain, it is left so without a word. Leaves it in
    evaluation mode.
    """
    if mx.default_device().type != mx.DeviceType.cpu or not rows:
        return None
    types = {array.dtype for _, array in tree_flatten(model.parameters()) if mx.issubdtype(array.dtype, mx.floating)}
    if types != {mx.float32}:
        return "the fast CPU kernels are off: they need model.dtype float32"
    model.eval()  # no dropout, which would differ between the two
    tokens_BxL = collate(rows[:2]).inputs_BxL[:, :_COMPARED_TOKENS]
    skipped = _skipped(model, frozen, tokens_BxL)
    plain = _answers(model, tokens_BxL, skipped)
    _replace(model)
    try:
        fast = _answers(model, tokens_BxL, skipped)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        uninstall(model)
        return f"the fast CPU kernels are off: they do not fit this model's code ({error})"
    distances = [_distance(a, b) for a, b in zip(fast, plain, strict=True)]
    if all(distance <= TOLERANCE for distance in distances):
        model.has_cpu_kernels = True
        return None
    uninstall(model)
    return f"the fast CPU kernels are off: with this model they differ from MLX by {max(distances):.1e}"


def uninstall(model: nn.Module) -> None:
    """Undo `install`."""
    model.has_cpu_kernels = False
    for module in model.modules():
        if plain := vars(type(module)).get("plain_kind"):
            module.__class__ = plain


def _skipped(model: nn.Module, frozen: int, tokens_BxL: mx.array) -> States | None:
    """The embeddings in place of what `frozen` layers put out; None if these have kinds of modules of their own."""

    def kinds(layers: Sequence[nn.Module]) -> set[type]:
        return {type(module) for layer in layers for module in layer.modules()}

    has_own_kinds = not kinds(model.layers[:frozen]) <= kinds(model.layers[frozen:])
    return None if has_own_kinds else embedded(model, frozen, tokens_BxL)


def _answers(model: nn.Module, tokens_BxL: mx.array, skipped: States | None) -> list[mx.array]:
    """Logits, and the gradient by all that is trainable of a loss on them, as one vector."""

    def logits() -> mx.array:
        with fed(model, skipped):
            return model(tokens_BxL)

    def loss(tokens_BxL: mx.array) -> mx.array:
        return nn.losses.cross_entropy(logits(), tokens_BxL).mean()

    answers = [logits()]
    if tree_flatten(model.trainable_parameters()):
        _, gradients = nn.value_and_grad(model, loss)(tokens_BxL)
        answers.append(mx.concatenate([gradient.flatten() for _, gradient in tree_flatten(gradients)]))
    mx.eval(answers)
    return answers


def _distance(a: mx.array, b: mx.array) -> float:
    """The norm of the difference by the norm of `b`."""
    scale, difference = float(mx.linalg.norm(b.flatten())), float(mx.linalg.norm((a - b).flatten()))
    return difference / scale if scale else difference


def _replace(model: nn.Module) -> None:
    kinds: dict[type, type | None] = {}
    for parent in model.modules():
        for name, child in list(parent.items()):
            if isinstance(child, nn.Module) and not child:
                # Activations without weights may be one object for all models: this one gets its own.
                parent[name] = copy.copy(child)
    for module in model.modules():
        kind = type(module)
        if kind not in kinds:
            kinds[kind] = _fast_kind(kind)
        if (fast := kinds[kind]) is not None:
            module.__class__ = fast


def _fast_kind(kind: type) -> type | None:
    """A subclass whose functions see the replaced names; None if they use none of these."""
    functions: dict[str, Any] = {}
    for parent in reversed(kind.__mro__):
        for name, function in vars(parent).items():
            functions.pop(name, None)
            if isinstance(function, FunctionType) and (names := _replaced_names(function)):
                functions[name] = _with_globals(function, names)
    return type(kind.__name__, (kind,), functions | {"plain_kind": kind}) if functions else None


def _replaced_names(function: FunctionType) -> dict[str, Any]:
    """The names to replace in a function's module, of those that its code uses."""
    used, known = set(function.__code__.co_names), function.__globals__
    if not used & _USED:
        return {}
    return {name: fast for name, (plain, fast) in _REPLACED.items() if name in used and known.get(name) is plain}


def _with_globals(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    made = FunctionType(
        function.__code__, function.__globals__ | names, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made
