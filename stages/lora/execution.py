"""The optional savings of a model's computation, each compared with the plain form before it is used.

`set_up` puts the patches on a loaded model in their order (see patches.py), and opens the cache of its frozen layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from stages.lora import kernels, patches
from stages.lora.batches import collate
from stages.lora.frozen import FrozenLayers, States, embedded, fed
from stages.lora.frozen_cache import open_frozen
from stages.lora.head import backbone_of, head_logits, hidden_at, is_narrowed, logits_at
from stages.lora.selfcheck import Check, Results, compare, notes_of
from stages.lora.targets import frozen_layers
from stages.params import schema
from stages.tokens.row import TokenRow

_KERNEL_TOKENS = 64  # of each row that the kernels' check looks at


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
) -> Execution:
    """Patch a model that is to compute these rows, and open the cache of its frozen layers.

    `adapted` names the modules that are trained, or their weights; `base` is the identity of the base model. A step
    that `is_traced` (compiled) cannot use the CPU kernels. Leaves the model in evaluation mode.
    """
    model.eval()
    layers = frozen_layers(adapted, len(model.layers))
    checks = []
    if options.cpu_kernels and not is_traced:
        checks.append(use_kernels(model, rows, frozen=layers))
    checks.append(narrow_head(model, frozen=layers))
    if grad_checkpoint:
        patches.patch_layers(model.layers[layers:])
    frozen, note = open_frozen(model, layers, rows, options, base, cache_gb)
    return Execution(frozen, (*notes_of(checks), *([note] if note else [])))


def in_use(model: nn.Module) -> tuple[Callable[[nn.Module], None], ...]:
    """The patches that a model has: each is put on another of its kind and float type by a call, without a check."""
    found = ((kernels.in_use(model), patches.patch_kernels), (is_narrowed(model), patches.patch_backbone))
    return tuple(patch for is_there, patch in found if is_there)


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
    """Logits, and the gradient of a loss on them by all that is trainable."""

    def logits() -> mx.array:
        with fed(model, skipped):
            return model(tokens_BxL)

    def loss(tokens_BxL: mx.array) -> mx.array:
        return nn.losses.cross_entropy(logits(), tokens_BxL).mean()

    results: dict[str, Any] = {"logits": logits()}
    if tree_flatten(model.trainable_parameters()):
        results["gradient"] = nn.value_and_grad(model, loss)(tokens_BxL)[1]
    mx.eval(results)  # now: the model's code may be replaced after this
    return results


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
    return check
