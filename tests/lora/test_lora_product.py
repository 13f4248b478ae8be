"""An adapted linear module as one operation: the values, gradients and dropout of mlx-lm's."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

from stages.lora.lora_product import adapted, can_run


def module(*, bias: bool = False, dropout: float = 0.0) -> Any:
    mx.random.seed(0)
    linear = nn.Linear(12, 20, bias=bias)
    linear.freeze()
    made = LoRALinear.from_base(linear, r=4, dropout=dropout, scale=3.0)
    made.lora_b = mx.random.normal((4, 20))
    return made


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_values_and_gradients_are_mlx_lms(bias: bool, dropout: float) -> None:
    made, x = module(bias=bias, dropout=dropout), mx.random.normal((2, 5, 12))
    assert can_run(made)

    def results(form: Any) -> dict[str, np.ndarray]:
        def loss(parameters: Any, x: mx.array) -> mx.array:
            made.update(parameters)
            return mx.sin(form(made, x)).sum()

        mx.random.seed(1)
        value, (parameters, d_x) = mx.value_and_grad(loss, argnums=(0, 1))(made.trainable_parameters(), x)
        return {"value": np.array(value), "x": np.array(d_x)} | {n: np.array(a) for n, a in tree_flatten(parameters)}

    wanted, found = results(LoRALinear.__call__), results(adapted)
    assert set(wanted) == {"value", "x", "lora_a", "lora_b"}
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_it_does_not_cover_is_left_to_mlx_lm() -> None:
    half, trained, packed = module(), module(), module()
    half.set_dtype(mx.float16)
    trained.linear.unfreeze()
    packed.linear = nn.QuantizedLinear(64, 64)
    assert not any(map(can_run, (half, trained, packed)))
