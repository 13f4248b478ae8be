"""Classes of one model's modules, replaced by subclasses: nothing outside that model changes.

There are three patches, and execution.py puts them on in this order, once, as soon as the model is loaded:

1. CPU kernels: modules whose code uses SiLU, softmax, attention and the like see the functions of kernels.py, and
   LoRA layers that are there compute as one operation (lora_product.py).
2. Backbone: embeddings, layers and norm get a detour, by which the head sees chosen positions only (head.py).
3. Layers: each that gradients pass through forgets its activations and computes them again on the way back.

Each takes the classes that it finds, those of the patch before included. Adapter layers may be attached before or
after: after, they are mlx-lm's own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations
from mlx_lm.models import base as mlx_lm_base
from mlx_lm.tuner.lora import LoRALinear

from stages.lora import kernels, lora_product
from stages.lora.head import Detour, backbone_of


class _Namespace:
    """A module's names, some of them replaced."""

    def __init__(self, plain: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _plain=plain)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)


# Name in a model's code → the plain function or module that it stands for there, and what replaces it.
_REPLACED: dict[str, tuple[Any, Any]] = {
    "swiglu": (activations.swiglu, kernels.swiglu),
    "silu": (nn.silu, kernels.silu),
    "gelu_approx": (nn.gelu_approx, kernels.gelu_approx),
    "scaled_dot_product_attention": (mlx_lm_base.scaled_dot_product_attention, kernels.attention),
    "nn": (nn, _Namespace(nn, silu=kernels.silu, gelu_approx=kernels.gelu_approx)),
    "mx": (
        mx,
        _Namespace(
            mx,
            softmax=kernels.softmax,
            tanh=kernels.tanh,
            fast=_Namespace(
                mx.fast,
                scaled_dot_product_attention=kernels.fast_attention,
                rms_norm=kernels.rms_norm,
                rope=kernels.rope,
            ),
        ),
    ),
}
_USED = {"swiglu", "silu", "gelu_approx", "softmax", "tanh", "scaled_dot_product_attention", "rms_norm", "rope"}


# --- 1. CPU kernels ---


def patch_kernels(model: nn.Module) -> None:
    """Let the model's code see the CPU kernels in place of MLX's functions."""
    kinds: dict[type, type | None] = {}
    for parent in model.modules():
        for name, child in list(parent.items()):
            if isinstance(child, nn.Module) and not child:
                # Activations without weights may be one object for all models: this one gets its own.
                parent[name] = copy.copy(child)
    for module in model.modules():
        kind = type(module)
        if kind not in kinds:
            kinds[kind] = kernel_kind(kind)
        if (fast := kinds[kind]) is not None:
            module.__class__ = fast
    model.has_cpu_kernels = True


def unpatch_kernels(model: nn.Module) -> None:
    """Undo `patch_kernels`, if no other patch came after it."""
    model.has_cpu_kernels = False
    for module in model.modules():
        if plain := vars(type(module)).get("plain_kind"):
            module.__class__ = plain


def kernel_kind(kind: type) -> type | None:
    """A subclass whose functions see the replaced names; None if they use none of these. LoRA's is one operation."""
    if kind is LoRALinear:
        return type(kind.__name__, (kind,), {"__call__": _call_adapted, "plain_kind": kind})
    functions: dict[str, Any] = {}
    for parent in reversed(kind.__mro__):
        for name, function in vars(parent).items():
            functions.pop(name, None)
            if isinstance(function, FunctionType) and (names := _replaced_names(function)):
                functions[name] = _with_globals(function, names)
    return type(kind.__name__, (kind,), functions | {"plain_kind": kind}) if functions else None


def _call_adapted(module: Any, x: mx.array) -> mx.array:
    return lora_product.adapted(module, x) if lora_product.can_run(module) else LoRALinear.__call__(module, x)


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


# --- 2. Backbone ---


def patch_backbone(model: nn.Module) -> None:
    """Give the model's backbone a detour; none is taken until head.py sets one."""
    backbone = backbone_of(model)
    kind = type(backbone)
    backbone.__class__ = type(kind.__name__, (kind,), {"__call__": _with_detour(kind), "detour": None})


def unpatch_backbone(model: nn.Module) -> None:
    """Undo `patch_backbone`, if no other patch came after it."""
    backbone = backbone_of(model)
    backbone.__class__ = type(backbone).__base__


def _with_detour(kind: Any) -> Any:
    plain = kind.__call__

    def call(backbone: Any, *args: Any, **kwargs: Any) -> Any:
        detour: Detour | None = backbone.detour
        if detour is None:
            return plain(backbone, *args, **kwargs)
        return detour(lambda: plain(backbone, *args, **kwargs))

    return call


# --- 3. Layers ---


def patch_layers(layers: Sequence[nn.Module]) -> None:
    """Let layers forget their activations and compute them again on the way back: gradient checkpointing.

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174).
    """
    for layer in layers:
        kind = type(layer)
        if not getattr(kind, "recomputes", False):
            # A subclass of its own for this very layer: other models with layers of this kind keep theirs.
            layer.__class__ = type(kind.__name__, (kind,), {"__call__": _recomputing(kind), "recomputes": True})


@contextmanager
def _drawing_from(key: mx.array) -> Iterator[None]:
    """Let MLX's random numbers begin at this key, for a while."""
    state: Any = mx.random.state
    after = mx.array(state[0])
    state[0][:] = key
    try:
        yield
    finally:
        state[0][:] = after


def _recomputing(kind: Any) -> Any:
    plain = kind.__call__

    def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def inner(trainable: Any, key: mx.array, *args: Any, **kwargs: Any) -> Any:
            layer.update(trainable)
            with _drawing_from(mx.stop_gradient(key)):
                return plain(layer, *args, **kwargs)

        # A key of the layer's own, or dropout would drop others when the layer is computed again.
        key = mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)
        return mx.checkpoint(inner)(layer.trainable_parameters(), key, *args, **kwargs)

    return call
