"""The self-check: the results of a faster form of a computation compared with those of the plain form.

The plain form is the one that MLX and mlx-lm have. Every saving (CPU kernels, head at chosen positions, frozen layers,
fused loss, compiled step) passes `compare` on the first rows before it is used; otherwise the plain form is used, and a
note says why. The caller puts the model into evaluation mode, for dropout would differ between the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from stages.lora.batches import Batch, collate
from stages.lora.frozen import FrozenLayers, embedded
from stages.model.load import floating_dtype
from stages.tokens.row import TokenRow

# Quantity → array, or tree of arrays.
Results = Mapping[str, Any]

# By quantity and by the model's float type, the largest norm of the difference over the norm of the plain result.
# Float32 rounds each sum to some 1e-6, halves to 1e-2 and less.
TOLERANCES: dict[str, dict[mx.Dtype, float]] = {
    "logits": {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 5e-2},
    "loss": {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 1e-2},
    "gradient": {mx.float32: 1e-3, mx.float16: 5e-2, mx.bfloat16: 5e-2},
}

# A second's work for a small model on a CPU.
_ROWS, _TOKENS = 2, 32
# Trained tokens of a row: MLX takes milliseconds for each over a wide vocabulary.
_TRAINED = 4


@dataclass(frozen=True)
class Check:
    """The outcome for one saving: used if `reason` is None, and otherwise why not. `name` is as the user knows it."""

    name: str
    reason: str | None = None

    @property
    def passed(self) -> bool:
        return self.reason is None

    @property
    def note(self) -> str | None:
        """A line for the user about a saving that is not used."""
        return None if self.reason is None else f"{self.name} is not used: {self.reason}"


def notes_of(checks: Sequence[Check]) -> tuple[str, ...]:
    """The notes of those checks that did not pass."""
    return tuple(check.note for check in checks if check.note is not None)


def compare(model: nn.Module, name: str, plain: Callable[[], Results], fast: Callable[[], Results]) -> Check:
    """Compare the results of the fast form with those of the plain form on the same tokens.

    Any exception of the fast form is a reason too: users bring models that it was never tried on.
    """
    wanted = _evaluated(plain())
    try:
        found = _evaluated(fast())
    except Exception as error:
        return Check(name, f"it fails ({type(error).__name__}: {error})".splitlines()[0])
    dtype = floating_dtype(model)
    for quantity, arrays in wanted.items():
        difference = relative_difference(found[quantity], arrays)
        if not difference <= TOLERANCES[quantity].get(dtype, TOLERANCES[quantity][mx.float32]):
            return Check(name, f"{difference:.2%} off in the {quantity}")
    return Check(name)


def relative_difference(found: Mapping[str, mx.array], wanted: Mapping[str, mx.array]) -> float:
    """The norm of the difference over the norm of what is wanted; infinite where shapes differ."""
    if any(found[name].shape != array.shape for name, array in wanted.items()):
        return math.inf
    scale, difference = _norm(wanted.values()), _norm(found[name] - array for name, array in wanted.items())
    return difference / scale if scale else difference


def _norm(arrays: Any) -> float:
    return math.sqrt(sum(float(mx.square(array).sum()) for array in arrays))


def _evaluated(results: Results) -> dict[str, dict[str, mx.array]]:
    """Each quantity as arrays by name, in float32."""
    arrays = {
        quantity: {name: array.astype(mx.float32) for name, array in tree_flatten({"": value})}
        for quantity, value in results.items()
    }
    mx.eval(arrays)
    return arrays


def check_batch(rows: Sequence[TokenRow], frozen: FrozenLayers | None = None, *, few_shapes: bool = False) -> Batch:
    """The first rows up to their last trained token, the start of long ones left out, few tokens of each trained.

    The `frozen` layers are not run for it: their embeddings stand for what they put out.
    """
    batch = collate([_excerpt(row) for row in rows[:_ROWS]], few_shapes=few_shapes)
    if frozen is None:
        return batch
    return replace(batch, states=embedded(frozen.model, frozen.layers, batch.inputs_BxL))


def _excerpt(row: TokenRow) -> TokenRow:
    trained = row.loss_mask.nonzero()[0][-_TRAINED:]
    end = int(trained[-1]) + 1
    part = slice(max(end - _TOKENS, 0), end)
    mask = np.isin(np.arange(len(row.loss_mask)), trained)
    return replace(row, input_ids=row.input_ids[part], loss_mask=mask[part])
