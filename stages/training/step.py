"""Loss and gradients of a batch, plain or compiled: traced once for each shape, its operations fused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from stages.lora import adapter
from stages.lora.batches import Batch
from stages.lora.loss import Loss
from stages.model.load import on_cpu

Step = Callable[[nn.Module, Batch], tuple[mx.array, Any]]


def plain_step(model: nn.Module, loss: Loss) -> Step:
    """(model, batch) → the loss and the tree of its gradients."""
    step: Step = nn.value_and_grad(model, loss)
    return step


def compiled_step(model: nn.Module, loss: Loss) -> Step:
    """The same compiled. Each shape of a batch is traced anew: see `collate`'s `few_shapes`."""
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
    """What keeps MLX from compiling here, if anything does."""
    if on_cpu() and shutil.which("g++") is None:
        return "on a CPU MLX compiles with g++, and there is none"
    return None
