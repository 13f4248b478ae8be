"""The optional savings of a model's computation, each compared with the plain form before it is used.

`set_up` puts the patches on a loaded model in their order (see patches.py), and opens the cache of its frozen layers.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from stages.base import store
from stages.files.hashes import digest_of
from stages.lora import code, kernels, patches
from stages.lora.adapter import frozen_layers
from stages.lora.batches import collate
from stages.lora.frozen import FrozenLayers, States, embedded, fed
from stages.lora.head import backbone_of, head_logits, hidden_at, is_narrowed, logits_at
from stages.lora.selfcheck import Check, Results, compare, notes_of
from stages.lora.state_cache import StateCache, evict
from stages.model import blas
from stages.model.load import floating_dtype
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
    frozen, note = _cut(model, layers, rows, options, base, cache_gb)
    return Execution(frozen, (*notes_of(checks), *([note] if note else [])))


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


# --- Frozen layers ---


def _cut(
    model: nn.Module, layers: int, rows: Sequence[TokenRow], options: schema.Model, base: str, cache_gb: float
) -> tuple[FrozenLayers | None, str | None]:
    """The frozen layers, whose output is the same bits kept or computed anew: the disk shapes no result. And a note."""
    if options.cache_frozen == "off":
        return None, None
    if layers == 0:
        return None, "no layers are frozen: the adapter begins at the first"
    frozen = FrozenLayers(model, layers)
    if reason := frozen.unfit(rows):
        return None, Check("model.cache_frozen", reason).note
    folder = store.project("cache") / _fingerprint(model, layers, base)
    cache, reason = _open_cache(folder, rows, model, options, cache_gb)
    frozen = replace(frozen, cache=cache)
    if cache is None or not cache.verified:
        check = _verify(frozen, rows[:2])
        if not check.passed:
            if cache is not None:
                cache.close()
            return None, check.note
    what = f"the lowest {layers} of {len(model.layers)} layers are frozen: what they put out for a row is computed"
    if cache is None:
        return frozen, f"{what} each time ({reason}); model.cache_frozen: off computes them with the batch"
    return frozen, f"{what} once and kept ({cache.size() / 1e6:,.0f} MB so far, in {folder.parent}/{folder.name[:8]}…)"


def check_frozen(frozen: FrozenLayers, rows: Sequence[TokenRow]) -> Check:
    """Compare the logits from the states of frozen layers, cached ones if there are any, with the plain model's."""
    name = "model.cache_frozen"
    try:
        # First of all: what a layer leaves behind for a later one must not be there when the states are used.
        states = frozen.beginnings(rows)
    except Exception as error:  # whatever an unknown model trips over
        return Check(name, f"the model's layers cannot be cut apart ({error})")
    return compare(
        frozen.model,
        name,
        lambda: {"logits": frozen.logits(rows)},
        lambda: {"logits": frozen.logits(rows, states)},
    )


def _verify(frozen: FrozenLayers, rows: Sequence[TokenRow]) -> Check:
    """Check frozen layers once for their cache; states that are another model's make way for new ones."""
    found = check_frozen(frozen, rows)
    if frozen.cache is None:
        return found
    if not found.passed:
        frozen.cache.clear()
        found = check_frozen(frozen, rows)
    if found.passed:
        frozen.cache.mark_verified()
    return found


def _open_cache(
    folder: Path, rows: Sequence[TokenRow], model: nn.Module, options: schema.Model, cache_gb: float
) -> tuple[StateCache | None, str | None]:
    """The opened cache, with room for all rows; or None and the reason, where that needs more than it may."""
    limit, insist = int(cache_gb * 1e9), options.cache_frozen == "on"
    try:
        cache = StateCache(folder)
    except OSError as error:
        if insist:
            raise
        return None, f"{error.filename or folder}: {error.strerror}"
    token = _bytes_a_token(model)
    needed = token * sum(len(row.input_ids) - 1 for row in rows)
    missing = token * sum(len(row.input_ids) - 1 for row in rows if row.input_ids[:-1] not in cache)
    if missing and cache.size() + missing > limit >= needed:
        cache.clear()  # what earlier rows left fills it
        missing = needed
    fits = cache.size() + missing <= limit
    evict(folder.parent, keep=folder, to=max(limit - missing, 0))
    if insist or (fits and missing <= shutil.disk_usage(folder).free // 2):
        return cache, None
    cache.close()
    return None, f"{needed / 1e9:.2f} GB to keep is more than {'half of the free disk' if fits else 'runtime.cache_gb'}"


def _bytes_a_token(model: nn.Module) -> int:
    states = embedded(model, len(model.layers) - 1, mx.array([[1]]))
    return 0 if states is None else states.hidden_BxLxD.nbytes  # None: the check that follows says why


def _fingerprint(model: nn.Module, layers: int, base: str) -> str:
    """Digest of all that the states of a row follow from besides its tokens."""
    parts = {
        "base": base,
        "layers": layers,
        "dtype": str(floating_dtype(model)),
        "device": str(mx.default_device()),
        "blas": Path(blas.loaded() or "").name,
        "cpu_kernels": kernels.in_use(model),
    }
    # Loading belongs to it: states follow from how weights were dequantised and rounded.
    return digest_of(parts | code.fingerprint("stages.lora.frozen", "stages.lora.patches", "stages.model.load"))[:32]
