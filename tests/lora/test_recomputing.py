"""Layers that forget their activations: what is computed again is what was computed before."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from stages.lora import patches


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8, bias=False), nn.Dropout(0.5)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(self.dropout(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [Layer(), Layer()]

    def __call__(self, x: mx.array) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


def test_dropout_drops_the_same_on_the_way_back() -> None:
    mx.random.seed(1)
    model, x = Stack(), mx.random.normal((4, 8))
    patches.patch_layers(model.layers)
    model.train()

    def loss(model: Any) -> mx.array:
        mx.random.seed(3)
        return mx.square(model(x)).sum()

    _, gradient = nn.value_and_grad(model, loss)(model)
    weight = model.layers[0].linear.weight
    direction, values = mx.random.normal(weight.shape), []
    for sign in (1, -1):
        model.layers[0].linear.weight = weight + sign * 1e-3 * direction
        values.append(loss(model).item())
    found = (gradient["layers"][0]["linear"]["weight"] * direction).sum().item()
    assert found == pytest.approx((values[0] - values[1]) / 2e-3, rel=1e-3)


def test_two_layers_drop_each_their_own() -> None:
    mx.random.seed(1)
    model, x = Stack(), mx.ones((1, 8))
    for layer in model.layers:
        layer.linear.weight = mx.eye(8)
    patches.patch_layers(model.layers)
    model.train()
    alive = [(model(x) > 0).sum().item() for _ in range(40)]
    assert min(alive) < 4 and len(set(alive)) > 2  # 2 of 8 on the average, and not the same 4 twice
