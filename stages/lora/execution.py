"""What a run may leave out: the CPU's slow functions, and the frozen layers of rows whose states are known.

Each is checked against the plain way before it is taken; what was found is said in a line.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.base import store
from stages.base.manifest import Manifest
from stages.cli import console
from stages.files import hashes
from stages.lora import code
from stages.model import blas
from stages.params import schema

if TYPE_CHECKING:
    from stages.lora.frozen import FrozenPrefix
    from stages.lora.state_cache import StateCache
    from stages.tokens.row import TokenRow


def take(
    model: Any,
    adapted: Iterable[str],
    rows: Sequence[TokenRow],
    *,
    settings: schema.Params,
    manifest: Manifest,
    kernels: bool,
) -> FrozenPrefix | None:
    """Install the CPU's `kernels`, if wanted, and give the prefix below the `adapted` modules, if there is any.

    The prefix puts out the same bits whether they are kept or computed anew each time: the disk shapes no result.
    """
    from stages.lora import patches
    from stages.lora.adapter import frozen_layers
    from stages.lora.frozen import FrozenPrefix

    count = len(model.layers)
    layers = frozen_layers(adapted, count)
    if kernels and (why_not := patches.install(model, rows, frozen=layers)):
        console.warn(why_not)
    if settings.model.cache_frozen == "off":
        return None
    if layers == 0:
        console.say("no layers are frozen: the adapter begins at the first")
        return None
    folder = store.project("cache") / _fingerprint(model, layers, manifest)
    found = FrozenPrefix(model, layers)
    if reason := found.unfit(rows):
        console.say(f"every layer runs each time: {reason}")
        return None
    found.cache, reason = _cache(folder, rows, model, settings)
    if (found.cache is None or not found.cache.verified) and (mismatch := _checked(found, rows[:2])):
        close(found)
        console.warn(f"every layer runs each time: {mismatch}")
        return None
    what = f"the lowest {layers} of {count} layers are frozen: what they put out for a row is computed"
    if found.cache is None:
        console.say(f"{what} each time ({reason}); model.cache_frozen: off computes them with the batch")
    else:
        size = f"{found.cache.size() / 1e6:,.0f} MB"
        console.say(f"{what} once and kept ({size} so far, in {folder.parent}/{folder.name[:8]}…)")
    return found


def close(found: FrozenPrefix | None) -> None:
    """Close the cache, and say what it ran into."""
    if found is None or found.cache is None:
        return
    found.cache.close()
    if found.cache.problem:
        console.warn(found.cache.problem)


def _checked(found: FrozenPrefix, rows: Sequence[TokenRow]) -> str | None:
    """Compare with the plain model, once for a cache; states that are another model's make way for new ones."""
    mismatch = found.mismatch(rows)
    if found.cache is None:
        return mismatch
    if mismatch is not None:
        found.cache.clear()
        mismatch = found.mismatch(rows)
    if mismatch is None:
        found.cache.mark_verified()
    return mismatch


def _cache(
    folder: Path, rows: Sequence[TokenRow], model: Any, settings: schema.Params
) -> tuple[StateCache | None, str | None]:
    """The opened cache, with room for all rows; or None and the reason, where that needs more than it may."""
    from stages.lora.state_cache import StateCache, evict

    limit, insist = int(settings.runtime.cache_gb * 1e9), settings.model.cache_frozen == "on"
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


def _bytes_a_token(model: Any) -> int:
    import mlx.core as mx

    from stages.lora.frozen import embedded

    states = embedded(model, len(model.layers) - 1, mx.array([[1]]))
    return 0 if states is None else states.hidden_BxLxD.nbytes  # None: the check that follows says why


def _fingerprint(model: Any, layers: int, manifest: Manifest) -> str:
    """What the states of a row follow from besides its tokens."""
    import mlx.core as mx

    from stages.lora import kernels as cpu
    from stages.model.load import floating_dtype

    return hashes.digest_of(
        {
            "base": manifest.identity,
            "layers": layers,
            "dtype": str(floating_dtype(model)),
            "device": str(mx.default_device()),
            "blas": Path(blas.loaded() or "").name,
            "cpu_kernels": cpu.in_use(model),
        }
        | code.fingerprint("stages.lora.frozen", "stages.lora.patches")
    )[:32]
