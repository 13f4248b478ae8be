"""The step of an update: loss and gradients of a batch, fused and compiled where the self-checks allow it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from stages.lora import adapter
from stages.lora.batches import Batch
from stages.lora.frozen import FrozenLayers
from stages.lora.head import head_matrix
from stages.lora.loss import Loss, fused_sum_loss, sum_loss, why_not_fused
from stages.lora.selfcheck import Check, Results, check_batch, compare, notes_of
from stages.model.load import on_cpu
from stages.params import schema
from stages.tokens.row import TokenRow

# (model, batch) → the sum of the loss over the batch's trained tokens, and the tree of its gradients.
ValueAndGrad = Callable[[nn.Module, Batch], tuple[mx.array, Any]]


@dataclass(frozen=True)
class Step:
    """The chosen form; `notes` are lines for the user about a form that was wanted and is not used."""

    value_and_grad: ValueAndGrad
    is_fused: bool
    is_compiled: bool
    notes: tuple[str, ...] = ()


def choose_step(
    model: nn.Module, rows: Sequence[TokenRow], options: schema.Train, *, frozen: FrozenLayers | None = None
) -> Step:
    """The fused loss and the compiled step, if they are wanted and give what the plain ones give on the first rows.

    The model has its adapter on and is in evaluation mode.
    """
    checks = []
    loss: Loss = sum_loss
    if options.fused_loss:
        checks.append(_check_fused(model, rows, frozen))
        loss = fused_sum_loss if checks[-1].passed else sum_loss
    step, is_compiled = plain_step(model, loss), False
    if options.compile == "on" or (options.compile == "auto" and not on_cpu()):
        compiled = compiled_step(model, loss)
        checks.append(_check_compiled(model, step, compiled, rows, frozen))
        step, is_compiled = (compiled, True) if checks[-1].passed else (step, False)
    return Step(step, loss is fused_sum_loss, is_compiled, notes_of(checks))


def _check_fused(model: nn.Module, rows: Sequence[TokenRow], frozen: FrozenLayers | None) -> Check:
    name = "train.fused_loss"
    if reason := why_not_fused(model):
        return Check(name, reason)
    batch = check_batch(rows, frozen)
    matrix_VxD = head_matrix(model)
    in_two = partial(
        fused_sum_loss,
        chunk_rows=-(-batch.trained_tokens // 2),
        columns=None if matrix_VxD is None else -(-len(matrix_VxD) // 2),
    )
    plain, fused = (partial(_results, plain_step(model, form), model, batch) for form in (sum_loss, in_two))
    with adapter.stirred(model):
        return compare(model, name, plain, fused)


def _check_compiled(
    model: nn.Module,
    plain: ValueAndGrad,
    compiled: ValueAndGrad,
    rows: Sequence[TokenRow],
    frozen: FrozenLayers | None,
) -> Check:
    name = "train.compile"
    if reason := why_not_compiled():
        return Check(name, reason)
    return compare(
        model,
        name,
        partial(_results, plain, model, check_batch(rows, frozen)),
        partial(_results, compiled, model, check_batch(rows, frozen, few_shapes=True)),
    )


def _results(step: ValueAndGrad, model: nn.Module, batch: Batch) -> Results:
    loss, gradient = step(model, batch)
    return {"loss": loss, "gradient": gradient}


def plain_step(model: nn.Module, loss: Loss) -> ValueAndGrad:
    """The step as it is written."""
    step: ValueAndGrad = nn.value_and_grad(model, loss)
    return step


def compiled_step(model: nn.Module, loss: Loss) -> ValueAndGrad:
    """The step compiled, its operations fused. Each shape of a batch is traced anew: see `collate`'s `few_shapes`."""
    step = plain_step(model, loss)

    def traced(arrays: dict[str, mx.array], layers: int, is_training: bool) -> tuple[mx.array, Any]:
        # `is_training` is a part of what is traced: with it dropout is, and without it is not.
        return step(model, Batch.of_arrays(arrays, layers=layers))

    # Weights and the random state go in as inputs, or they would be constants.
    run: Any = mx.compile(traced, inputs=[model.state, mx.random.state], outputs=[mx.random.state])

    def call(model: nn.Module, batch: Batch) -> tuple[mx.array, Any]:
        # Tracing leaves placeholders where gradients are taken, and everywhere if it fails.
        weights = adapter.weights(model)
        state = [(name, leaf) for name, leaf in tree_flatten(model.state) if isinstance(leaf, mx.array)]
        try:
            loss_sum, gradients = run(batch.arrays, batch.states.layers if batch.states else 0, model.training)
        except Exception:
            model.update(tree_unflatten(state), strict=False)
            mx.random.seed(0)
            raise
        model.load_weights(list(weights.items()), strict=False)
        return loss_sum, gradients

    return call


def why_not_compiled() -> str | None:
    """The reason why MLX cannot compile here, if there is one."""
    if on_cpu() and shutil.which("g++") is None:
        return "on a CPU MLX compiles with g++, and there is none"
    return None
