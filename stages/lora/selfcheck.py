"""A faster form of the training step against the plain one: the same loss and gradients, or a reason not to use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from stages.lora.batches import Batch, collate
from stages.lora.frozen import FrozenPrefix, embedded
from stages.model.load import floating_dtype
from stages.tokens.row import TokenRow

Taken = Callable[[], tuple[mx.array, Any]]

# Largest share by which the loss may differ, and the gradients: the norm of their difference against their norm.
# Float32 rounds each sum to some 1e-6, halves to 1e-2 and less.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
HALF_LOSS_TOLERANCE, HALF_GRADIENT_TOLERANCE = 1e-2, 5e-2

# A second's work for a small model on a CPU.
_ROWS, _TOKENS = 2, 32


def check_batch(rows: Sequence[TokenRow], prefix: FrozenPrefix | None = None, *, few_shapes: bool = False) -> Batch:
    """The first rows up to their last trained token, the start of long ones left out.

    The layers of a `prefix` are not run for it: their embeddings stand for what they put out.
    """
    batch = collate([_excerpt(row) for row in rows[:_ROWS]], few_shapes=few_shapes)
    if prefix is None:
        return batch
    return replace(batch, states=embedded(prefix.model, prefix.layers, batch.inputs_BxL))


def _excerpt(row: TokenRow) -> TokenRow:
    end = int(row.loss_mask.nonzero()[0][-1]) + 1
    part = slice(max(end - _TOKENS, 0), end)
    return replace(row, input_ids=row.input_ids[part], loss_mask=row.loss_mask[part])


def disagreement(model: nn.Module, plain: Taken, fast: Taken) -> str | None:
    """Why `fast` cannot stand for `plain`, each a loss and its gradients; None if it can.

    Both are to be taken on the same tokens (`check_batch`), of a model in evaluation mode.
    """
    wanted_loss, wanted = _evaluated(plain)
    try:
        loss, gradients = _evaluated(fast)
    except Exception as error:  # whatever an unknown model trips over
        return f"it fails ({type(error).__name__}: {error})".splitlines()[0]
    is_full = floating_dtype(model) == mx.float32
    loss_share = abs(loss - wanted_loss) / max(abs(wanted_loss), 1e-9)
    if not loss_share <= (LOSS_TOLERANCE if is_full else HALF_LOSS_TOLERANCE):
        return f"its loss is {loss:.6g} and should be {wanted_loss:.6g}"
    gradient_share = _norm([gradients[name] - array for name, array in wanted.items()]) / max(
        _norm(list(wanted.values())), 1e-9
    )
    if not gradient_share <= (GRADIENT_TOLERANCE if is_full else HALF_GRADIENT_TOLERANCE):
        return f"its gradients differ by {gradient_share:.2%}"
    return None


def _evaluated(taken: Taken) -> tuple[float, dict[str, mx.array]]:
    value, tree = taken()
    gradients = {name: gradient.astype(mx.float32) for name, gradient in tree_flatten(tree)}
    mx.eval(value, gradients)
    return float(value), gradients


def _norm(arrays: list[mx.array]) -> float:
    return math.sqrt(sum(float(mx.square(array).sum()) for array in arrays))
