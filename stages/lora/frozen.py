"""Frozen layers: those below the first adapted one, whose output for given tokens never changes.

Nothing in them is trained and they get no dropout, so their output (the states) is computed once per row and fed in at
the first adapted layer from then on. This needs nothing from the model's code: while states are fed in, stand-ins take
the frozen layers' places in `model.layers` and return them. A row's states are computed with the row alone, so that
they are the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from stages.lora.state_cache import StateCache
from stages.model.phi3 import LongRoPE
from stages.tokens.row import TokenRow

# (model, tokens (1, L)) → something of each token, (L, ...).
Readout = Callable[[nn.Module, mx.array], mx.array]

_CHECK_TOKENS = 128  # of each row that the start-up check looks at


class _ReachedError(Exception):
    """Ends a forward pass at the first adapted layer; its argument is what the frozen ones put out."""


class _StandIn:
    """A stand-in for a layer, with the layer's own attributes (its kind of attention, say)."""

    def __init__(self, layer: nn.Module, states_BxLxD: mx.array | None = None) -> None:
        self._layer, self._states_BxLxD = layer, states_BxLxD

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, hidden_BxLxD: mx.array, *_args: Any, **_kwargs: Any) -> mx.array:
        if self._states_BxLxD is None:
            raise _ReachedError(hidden_BxLxD)
        return self._states_BxLxD


@dataclass(frozen=True)
class States:
    """The output of the lowest `layers` layers for a batch, (B, L, D)."""

    layers: int
    hidden_BxLxD: mx.array


@contextmanager
def fed(model: nn.Module, states: States | None) -> Iterator[None]:
    """Let the model start from these states; None leaves it as it is."""
    if states is None:
        yield
        return
    layers = _layers(model)
    below = layers[: states.layers]
    layers[: states.layers] = [_StandIn(layer, states.hidden_BxLxD) for layer in below]
    try:
        yield
    finally:
        layers[: states.layers] = below


def _layers(model: nn.Module) -> list[Any]:
    """The list itself that the model goes through; `model.layers` may be a copy of it."""
    named: list[Any] = model.layers
    if model.layers is named:
        return named  # no copy, which would be another each time
    for module in model.modules():
        for value in module.values():
            if isinstance(value, list) and len(value) == len(named) and value[0] is named[0]:
                return value
    return named


@dataclass(frozen=True)
class FrozenLayers:
    """The lowest `layers` layers of a model, skipped wherever a row's states are known.

    `cache` keeps states from one process to the next; without one they are computed whenever they are asked for.
    """

    model: nn.Module
    layers: int
    cache: StateCache | None = None

    def states(self, rows: Sequence[TokenRow], *, length: int | None = None) -> States:
        """The states of rows, of each all tokens but the last, padded at their end to `length` or to the longest."""
        length = length or max(len(row.input_ids) for row in rows) - 1
        found = [self._row_states(row.input_ids[:-1]) for row in rows]
        # Padded with the last token's: zeros are states that no model ever sees, and some norms divide by them.
        padded = [mx.pad(states_LxD, [(0, length - len(states_LxD)), (0, 0)], mode="edge") for states_LxD in found]
        return States(self.layers, mx.stack(padded))

    def unfit(self, rows: Sequence[TokenRow]) -> str | None:
        """The reason why the states of these rows would depend on the batch that they are in, or None."""
        for module in self.model.modules():
            if isinstance(module, LongRoPE) and any(len(row.input_ids) - 1 > module.original_length for row in rows):
                return f"rows of over {module.original_length} tokens change the positions of all rows in their batch"
        return None

    def beginnings(self, rows: Sequence[TokenRow]) -> list[mx.array]:
        """The states of each row's first tokens, (l, D): kept ones if there are any.

        Raises:
            ValueError: the model's layers cannot be cut apart.
        """
        return [self._row_states(row.input_ids[:-1])[:_CHECK_TOKENS] for row in rows]

    def run_on(self, rows: Sequence[TokenRow], read: Readout, states: Sequence[mx.array] | None = None) -> mx.array:
        """What `read` makes of the first tokens of rows, one after another, (tokens, ...); or of their states."""
        found = []
        for i, row in enumerate(rows):
            with fed(self.model, None if states is None else States(self.layers, states[i][None])):
                found.append(read(self.model, mx.array(row.input_ids[None, :-1][:, :_CHECK_TOKENS])))
        return mx.concatenate(found)

    def _row_states(self, ids_L: np.ndarray) -> mx.array:
        if self.cache is None:
            return self._computed(ids_L)
        states_LxD = self.cache.read(ids_L)
        if states_LxD is None:
            states_LxD = self._computed(ids_L)
            self.cache.write(ids_L, states_LxD)
        return states_LxD

    def _computed(self, ids_L: np.ndarray) -> mx.array:
        training = self.model.training
        self.model.eval()
        try:
            states_1xLxD = _reaching(self.model, self.layers, mx.array(ids_L[None]))
        finally:
            self.model.train(training)
        mx.eval(states_1xLxD)
        return states_1xLxD[0]


def embedded(model: nn.Module, layers: int, tokens_BxL: mx.array) -> States | None:
    """The embeddings in place of what the lowest layers put out: for checks, in which any hidden states will do.

    So those layers do not run, and their weights need not be read. None if there are no such layers, or no way in.
    """
    if not layers:
        return None
    try:
        states = States(layers, _reaching(model, 0, tokens_BxL))
        with fed(model, states):
            model(tokens_BxL)  # a graph alone: layers may hand on more than hidden states
    except Exception:  # whatever an unknown model trips over
        return None
    return states


def _reaching(model: nn.Module, layer: int, tokens_BxL: mx.array) -> mx.array:
    """The input of a layer, (B, L, D).

    Raises:
        ValueError: the layer is never called, or with something else.
    """
    layers = _layers(model)
    there = layers[layer]
    layers[layer] = _StandIn(there)
    try:
        model(tokens_BxL)
    except _ReachedError as reached:
        hidden_BxLxD: mx.array = reached.args[0]
    else:
        raise ValueError(f"its layer {layer} is never called")
    finally:
        layers[layer] = there
    if not isinstance(hidden_BxLxD, mx.array) or hidden_BxLxD.shape[:2] != tokens_BxL.shape:
        raise ValueError("what a layer passes on is not (B, L, D)")
    return hidden_BxLxD
