"""Merging: the merged model says what the adapter said, or the loss is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from stages.lora import adapter
from stages.merging import fuse as merge
from stages.merging.agreement import divergences, log_probabilities
from stages.model.load import floating_dtype, load_base
from stages.tokens.row import TokenRow
from tests.support.adapters import config, fill
from tests.support.rows import one_by_one
from tests.support.tiny import write_llama


@pytest.fixture(scope="module")
def quantized_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("quantized"), quantize=True, dtype="float16")


def adapted(directory: Path, **options: Any) -> Any:
    model = load_base(directory, **options)[0]
    adapter.attach(model, config(), seed=0)
    fill(model)
    return model


def test_fused_weights_are_base_plus_scaled_product(tiny_llama: Path) -> None:
    model = adapted(tiny_llama)
    module = model.layers[2].self_attn.q_proj
    expected = np.array(module.linear.weight) + 2.0 * (np.array(module.lora_a) @ np.array(module.lora_b)).T
    assert len(merge.fuse(model, dtype=mx.float32, requantize=False)) == 4
    np.testing.assert_allclose(np.array(model.layers[2].self_attn.q_proj.weight), expected, atol=1e-5)


def test_merged_and_adapter_agree(tiny_llama: Path, rows: list[TokenRow]) -> None:
    said = log_probabilities(adapted(tiny_llama), one_by_one(rows))
    model = adapted(tiny_llama)
    merge.fuse(model, dtype=mx.float32, requantize=False)
    found = divergences(said, log_probabilities(model, one_by_one(rows)))
    assert found.mean() < 1e-6


def test_a_lost_adapter_shows_in_the_divergence(tiny_llama: Path, rows: list[TokenRow]) -> None:
    said = log_probabilities(adapted(tiny_llama), one_by_one(rows))
    found = divergences(said, log_probabilities(load_base(tiny_llama)[0], one_by_one(rows)))
    assert found.mean() > 0.1
    assert found.max() > found.mean()


def test_dequantised_merging_of_a_packed_base_loses_nothing(quantized_llama: Path, rows: list[TokenRow]) -> None:
    said = log_probabilities(adapted(quantized_llama), one_by_one(rows))
    model = adapted(quantized_llama, dequantize=True)
    merge.fuse(model, dtype=mx.float32, requantize=False)
    assert not any(isinstance(module, nn.QuantizedLinear) for module in model.modules())
    assert divergences(said, log_probabilities(model, one_by_one(rows))).mean() < 1e-6


def test_requantising_packs_the_adapted_modules_alone_and_the_check_sees_the_loss(
    quantized_llama: Path, rows: list[TokenRow]
) -> None:
    said = log_probabilities(adapted(quantized_llama), one_by_one(rows))
    model = adapted(quantized_llama, dequantize=False, keep_dtype=True)
    before = np.array(model.layers[2].mlp.up_proj.weight)
    merge.fuse(model, dtype=floating_dtype(model), requantize=True)
    assert isinstance(model.layers[2].self_attn.q_proj, nn.QuantizedLinear)
    assert np.array_equal(np.array(model.layers[2].mlp.up_proj.weight), before)
    assert divergences(said, log_probabilities(model, one_by_one(rows))).mean() > 1e-5


def test_a_packed_base_is_dequantised_in_float32(quantized_llama: Path) -> None:
    packed = load_base(quantized_llama, dequantize=False, keep_dtype=True)[0].layers[0].mlp.up_proj
    plain = load_base(quantized_llama, dequantize=True, dtype="float32")[0].layers[0].mlp.up_proj
    scales, biases = packed.scales.astype(mx.float32), packed.biases.astype(mx.float32)
    exact = mx.dequantize(packed.weight, scales, biases, group_size=32, bits=4)
    assert mx.array_equal(plain.weight, exact).item()


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", mx.float16), ("float32", mx.float32), ("bfloat16", mx.bfloat16)]
)
def test_dtype_is_the_bases_own_unless_told(quantized_llama: Path, dtype: str, expected: mx.Dtype) -> None:
    model, config = load_base(quantized_llama, dtype=dtype, dequantize=True, keep_dtype=True)
    assert floating_dtype(model) == expected
    assert "quantization" not in config
