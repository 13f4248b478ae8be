"""The frozen layers of a run, with the cache of their output: its name, its room on the disk, its check.

In: a patched model, the number of its frozen layers, the rows. Out: `FrozenLayers`, or a line on why every layer runs.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from stages.base import store
from stages.files.hashes import digest_of
from stages.lora import code, kernels
from stages.lora.frozen import FrozenLayers, embedded
from stages.lora.head import hidden_at, is_narrowed
from stages.lora.selfcheck import Check, compare
from stages.lora.state_cache import StateCache, evict
from stages.lora.targets import frozen_layers
from stages.model import numerics
from stages.model.load import floating_dtype
from stages.params import schema
from stages.tokens.row import TokenRow

_LAYER = re.compile(r"\blayers\.(\d+)\.")


def open_frozen(
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


def frozen_identity(model: nn.Module, adapted: Iterable[str]) -> str:
    """Digest of the weights below the first adapted layer: of a merged model the same in every experiment.

    In place of a base model's identity, it finds the states of a model whose other layers change.
    """
    layers = frozen_layers(adapted, len(model.layers))
    digest = hashlib.sha256()
    for name, array in sorted(tree_flatten(model.parameters())):
        index = _LAYER.search(name)
        if index is None or int(index[1]) < layers:
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            is_float = mx.issubdtype(array.dtype, mx.floating)
            digest.update(np.array(array.astype(mx.float32) if is_float else array).tobytes())
    return digest.hexdigest()


def check_frozen(frozen: FrozenLayers, rows: Sequence[TokenRow]) -> Check:
    """Compare what the head sees from the states of frozen layers, kept ones if there are any, with the plain model's.

    Logits where the head is not apart.
    """
    name = "model.cache_frozen"
    try:
        # First of all: what a layer leaves behind for a later one must not be there when the states are used.
        states = frozen.beginnings(rows)
    except Exception as error:  # whatever an unknown model trips over
        return Check(name, f"the model's layers cannot be cut apart ({error})")
    return compare(
        frozen.model,
        name,
        lambda: {"logits": frozen.run_on(rows, _before_head)},
        lambda: {"logits": frozen.run_on(rows, _before_head, states)},
    )


def _before_head(model: nn.Module, tokens_1xL: mx.array) -> mx.array:
    """What a narrowed model's head sees, (L, D), from which its logits follow; of another the logits, (L, V)."""
    if not is_narrowed(model):
        logits_1xLxV: mx.array = model(tokens_1xL)
        return logits_1xLxV[0]
    return hidden_at(model, tokens_1xL, mx.arange(tokens_1xL.shape[1]))


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
        "numerics": numerics.machine(),
        "cpu_kernels": kernels.in_use(model),
    }
    # Loading belongs to it: states follow from how weights were dequantised and rounded.
    return digest_of(parts | code.fingerprint("stages.lora.frozen", "stages.lora.patches", "stages.model.load"))[:32]
