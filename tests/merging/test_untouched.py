"""What an adapter does not touch is the base's own, byte for byte."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from stages.lora import adapter
from stages.merging.fuse import fuse
from stages.merging.untouched import first_difference
from stages.model.load import load_base
from tests.support.adapters import config, fill

QUERIES = "model.layers.2.self_attn.q_proj"


def test_the_adapters_own_modules_alone_may_differ(tiny_llama: Path) -> None:
    base, merged = load_base(tiny_llama)[0], load_base(tiny_llama)[0]
    adapter.attach(merged, config(), seed=0)
    fill(merged)
    touched = fuse(merged, dtype=mx.float32, requantize=False)
    assert QUERIES in touched
    assert first_difference(base, merged, touched=touched) is None
    assert first_difference(base, merged, touched=[name for name in touched if name != QUERIES]) == f"{QUERIES}.weight"


def test_one_bit_elsewhere_is_found(tiny_llama: Path) -> None:
    base, merged = load_base(tiny_llama)[0], load_base(tiny_llama)[0]
    norm = merged.model.norm
    bits = norm.weight.view(mx.uint32)
    bits[3] = bits[3] ^ 1
    norm.weight = bits.view(mx.float32)
    assert first_difference(base, merged, touched=()) == "model.norm.weight"


def test_another_type_or_a_missing_tensor_is_a_difference(tiny_llama: Path) -> None:
    base = load_base(tiny_llama)[0]
    assert first_difference(base, load_base(tiny_llama, dtype="float16")[0], touched=()) is not None
    merged = load_base(tiny_llama)[0]
    merged.model.pop("norm")
    assert first_difference(base, merged, touched=()) == "model.norm.weight"
