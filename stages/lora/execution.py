"""The optional savings of a model's computation, each compared with the plain form before it is used.

`set_up` puts the patches on a loaded model in their order (see patches.py), and opens the cache of its frozen layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from stages.lora import kernels, patches
from stages.lora.adapter import stirred
from stages.lora.batches import collate
from stages.lora.frozen import FrozenLayers, States, embedded, fed
from stages.lora.frozen_cache import open_frozen
from stages.lora.head import backbone_of, head_logits, hidden_at, is_narrowed, logits_at, plain_head_rows
from stages.lora.selfcheck import Check, Results, compare, notes_of
from stages.lora.targets import frozen_layers
from stages.params import schema
from stages.tokens.row import TokenRow

_KERNEL_TOKENS = 64  # of each row that the kernels' check looks at
_KERNEL_POSITIONS = 4  # of all rows together, whose logits it looks at: MLX takes long over a wide vocabulary


@dataclass(frozen=True)
class Execution:
    """The savings in use: `frozen` layers, or None where every layer runs each time. `notes` are lines for the user."""

    frozen: FrozenLayers | None
    notes: tuple[str, ...]

    def close(self) -> str | None:
        """Close the cache; a line for the user if something went wrong with it on the way."""
        if self.frozen is None or self.frozen.cache is None:
            return None
        self.frozen.cache.close()
        return self.frozen.cache.problem


def set_up(
    model: nn.Module,
    rows: Sequence[TokenRow],
    *,
    adapted: Iterable[str],
    options: schema.Model,
    base: str,
    cache_gb: float,
    is_traced: bool = False,
    grad_checkpoint: bool = False,
    known: Patches | None = None,
) -> Execution:
    """Patch a model that is to compute these rows, and open the cache of its frozen layers.

    `adapted` names the modules that are trained, or their weights; `base` is the identity of the base model. A step
    that `is_traced` (compiled) cannot use the CPU kernels. With patches that are `known` to serve,
    nothing is checked. Leaves the model in evaluation mode.
    """
    model.eval()
    layers = frozen_layers(adapted, len(model.layers))
    checks = []
    if known is not None:
        patch(model, known)
    else:
        if options.cpu_kernels and not is_traced:
            checks.append(use_kernels(model, rows, frozen=layers))
        checks.append(narrow_head(model, frozen=layers))
    if grad_checkpoint:
        patches.patch_layers(model.layers[layers:])
    frozen, note = open_frozen(model, layers, rows, options, base, cache_gb)
    return Execution(frozen, (*notes_of(checks), *([note] if note else [])))


@dataclass(frozen=True)
class Patches:
    """The patches that a model has (see patches.py), for another model of its kind and float type."""

    kernels: bool
    backbone: bool
    plain_head_rows: int


def patches_of(model: nn.Module) -> Patches:
    """The patches of a model that passed its checks."""
    return Patches(kernels.in_use(model), is_narrowed(model), getattr(model, "plain_head_rows", 0))


def patch(model: nn.Module, known: Patches) -> None:
    """Put on a model the patches that one of its kind and float type was checked with."""
    if known.kernels:
        patches.patch_kernels(model)
    if known.backbone:
        patches.patch_backbone(model)
        model.plain_head_rows = known.plain_head_rows


# --- CPU kernels ---


def use_kernels(model: nn.Module, rows: Sequence[TokenRow], *, frozen: int = 0) -> Check:
    """Let a model use the CPU kernels, if it then gives the same logits and gradients on the first two rows.

    The lowest `frozen` layers are not run for this where those above are of the same kinds: their weights may never be
    needed. On a GPU, where there is nothing to gain, the model is left as it is.
    """
    name = "model.cpu_kernels"
    if mx.default_device().type != mx.DeviceType.cpu or not rows:
        return Check(name)
    types = {array.dtype for _, array in tree_flatten(model.parameters()) if mx.issubdtype(array.dtype, mx.floating)}
    if types != {mx.float32}:
        return Check(name, "the kernels need model.dtype float32")
    tokens_BxL = collate(rows[:2]).inputs_BxL[:, :_KERNEL_TOKENS]
    skipped = _skipped(model, frozen, tokens_BxL)

    def with_kernels() -> Results:
        patches.patch_kernels(model)
        return _logits_and_gradient(model, tokens_BxL, skipped)

    with stirred(model):
        check = compare(model, name, lambda: _logits_and_gradient(model, tokens_BxL, skipped), with_kernels)
    if not check.passed:
        patches.unpatch_kernels(model)
    return check


def _skipped(model: nn.Module, frozen: int, tokens_BxL: mx.array) -> States | None:
    """The embeddings in place of what `frozen` layers put out; None if these have kinds of modules of their own."""

    def kinds(layers: Sequence[nn.Module]) -> set[type]:
        return {type(module) for layer in layers for module in layer.modules()}

    has_own_kinds = not kinds(model.layers[:frozen]) <= kinds(model.layers[frozen:])
    return None if has_own_kinds else embedded(model, frozen, tokens_BxL)


def _logits_and_gradient(model: nn.Module, tokens_BxL: mx.array, skipped: States | None) -> Results:
    """Logits at a few positions spread over all tokens, and the gradient of a loss on them by all that is trainable.

    The last of them sees its whole row.
    """
    positions_N = mx.array(np.linspace(0, tokens_BxL.size - 1, _KERNEL_POSITIONS).astype(np.int32))

    def loss(tokens_BxL: mx.array) -> tuple[mx.array, mx.array]:
        with fed(model, skipped):
            logits_NxV = _logits_at(model, tokens_BxL, positions_N)
        targets_N = tokens_BxL.reshape(-1)[positions_N]
        return nn.losses.cross_entropy(logits_NxV, targets_N).mean(), logits_NxV

    if tree_flatten(model.trainable_parameters()):
        (_, logits_NxV), gradient = nn.value_and_grad(model, loss)(tokens_BxL)
        results: dict[str, Any] = {"logits": logits_NxV, "gradient": gradient}
    else:
        results = {"logits": loss(tokens_BxL)[1]}
    mx.eval(results)  # now: the model's code may be replaced after this
    return results


@contextmanager
def _narrowed(model: nn.Module) -> Iterator[None]:
    """For a while, let a head that seems to be apart see chosen positions only: whether it is, is found out later."""
    if backbone_of(model) is None or is_narrowed(model):
        yield
        return
    patches.patch_backbone(model)
    try:
        yield
    finally:
        patches.unpatch_backbone(model)


def _logits_at(model: nn.Module, tokens_BxL: mx.array, positions_N: mx.array) -> mx.array:
    """Logits at flattened positions, (N, V), the others not computed if the model lets itself be narrowed."""
    try:
        with _narrowed(model):
            return logits_at(model, tokens_BxL, positions_N)
    except Exception:  # whatever an unknown model trips over
        return model(tokens_BxL).reshape(tokens_BxL.size, -1)[positions_N]


# --- Head at chosen positions ---


def narrow_head(model: nn.Module, *, frozen: int = 0) -> Check:
    """Let the head see chosen positions only, if it then gives the plain model's logits, on four tokens.

    The lowest `frozen` layers are not run to find out.
    """
    name = "the head at trained positions alone"
    if backbone_of(model) is None:
        return Check(name, "this model's embeddings and layers are no module apart from its head")
    if is_narrowed(model):
        return Check(name)
    tokens_1xL, positions_N = mx.array([[1, 2, 3, 4]]), mx.array([1, 3])
    skipped = embedded(model, frozen, tokens_1xL)

    def plain() -> Results:
        with fed(model, skipped):
            logits_NxV = model(tokens_1xL)[0, positions_N]
        return {"logits": [logits_NxV, logits_NxV]}

    def narrowed() -> Results:
        patches.patch_backbone(model)
        with fed(model, skipped):
            behind = logits_at(model, tokens_1xL, positions_N)
            apart = head_logits(model, hidden_at(model, tokens_1xL, positions_N))
        return {"logits": [behind, apart]}

    check = compare(model, name, plain, narrowed)
    if not check.passed:
        patches.unpatch_backbone(model)
    else:
        model.plain_head_rows = plain_head_rows(model) if kernels.in_use(model) else 0
    return check
