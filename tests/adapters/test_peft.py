"""PEFT's folders, read: ranks, scales, patterns, and what is refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from stages.adapters import peft
from stages.model.load import load_base
from tests.support.peft_files import lora_pair, write_peft

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def update(folder: Path, module: str) -> np.ndarray:
    """The update of a module as our reader has it, transposed to PEFT's (out, in)."""
    saved = peft.read(folder)
    a, b = (np.array(saved.arrays[f"{module}.lora_{kind}"]).astype(np.float64) for kind in "ab")
    assert a.shape[1] == saved.config.rank
    return (saved.config.scale * a @ b).T


def product(tensors: dict[str, np.ndarray], module: str) -> np.ndarray:
    b, a = tensors[f"{module}.lora_B.weight"], tensors[f"{module}.lora_A.weight"]
    return b.astype(np.float64) @ a.astype(np.float64)


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_the_scale_is_alpha_over_the_rank_or_its_root(tmp_path: Path, use_rslora: bool, scale: float) -> None:
    tensors = lora_pair(Q)
    write_peft(tmp_path, tensors, use_rslora=use_rslora)
    saved = peft.read(tmp_path)
    assert (saved.config.rank, saved.config.scale, saved.config.dropout) == (4, scale, 0.1)
    assert (saved.config.keys, saved.config.layers, saved.config.type) == (("self_attn.q_proj",), (0,), "lora")
    np.testing.assert_array_equal(saved.arrays[f"{Q}.lora_a"], tensors[f"{Q}.lora_A.weight"].T)
    np.testing.assert_array_equal(saved.arrays[f"{Q}.lora_b"], tensors[f"{Q}.lora_B.weight"].T)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_modules_of_other_ranks_and_scales_become_one_rank_and_scale(tmp_path: Path, use_rslora: bool) -> None:
    tensors = lora_pair(Q, rank=4) | lora_pair(V, rank=6, seed=1)
    write_peft(tmp_path, tensors, rank_pattern={"v_proj": 6}, alpha_pattern={"q_proj": 5}, use_rslora=use_rslora)
    root = math.sqrt if use_rslora else float
    np.testing.assert_allclose(update(tmp_path, Q), 5 / root(4) * product(tensors, Q), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(update(tmp_path, V), 8 / root(6) * product(tensors, V), rtol=1e-5, atol=1e-5)


def test_a_pattern_matches_the_end_of_a_name_and_the_first_counts(tmp_path: Path) -> None:
    tensors = lora_pair(Q) | lora_pair(Q.replace(".0.", ".10."), seed=1)
    write_peft(tmp_path, tensors, alpha_pattern={"0.self_attn.q_proj": 4, "proj": 2, "self_attn.q_proj": 16})
    np.testing.assert_allclose(update(tmp_path, Q), product(tensors, Q), rtol=1e-6, atol=1e-6)
    other = Q.replace(".0.", ".10.")
    np.testing.assert_allclose(update(tmp_path, other), 4 * product(tensors, other), rtol=1e-6, atol=1e-6)


def test_halves_are_read(tmp_path: Path) -> None:
    tensors = {name: array.astype(np.float16) for name, array in lora_pair(Q).items()}
    write_peft(tmp_path, tensors)
    assert peft.read(tmp_path).arrays[f"{Q}.lora_a"].dtype == mx.float32
    np.testing.assert_array_equal(peft.read(tmp_path).arrays[f"{Q}.lora_a"], tensors[f"{Q}.lora_A.weight"].T)


def test_dora_brings_its_magnitudes(tmp_path: Path) -> None:
    m = np.arange(1, 33, dtype=np.float32)
    write_peft(tmp_path, lora_pair(Q) | {f"{Q}.lora_magnitude_vector": m}, use_dora=True)
    saved = peft.read(tmp_path)
    assert saved.config.type == "dora"
    np.testing.assert_array_equal(saved.arrays[f"{Q}.m"], m)


def test_fan_in_fan_out_changes_no_matrix(tmp_path: Path) -> None:
    write_peft(tmp_path / "a", lora_pair(Q))
    write_peft(tmp_path / "b", lora_pair(Q), fan_in_fan_out=True)
    one, other = (peft.read(tmp_path / name).arrays for name in "ab")
    assert all(mx.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', 'LORA' is read; merge it with PEFT"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \(\['lm_head'\]\) has no exact form here; merge it"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"bias": "lora_only"}, r"bias \('lora_only'\)"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "olora"}, r"init_lora_weights \('olora'\)"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
        ({"a_key_of_tomorrow": 1}, "a_key_of_tomorrow"),
        ({"r": 3}, "q_proj has rank 4, adapter_config.json says 3; save it anew"),
        ({"r": 0, "rank_pattern": {}}, "not a LoRA config .ZeroDivisionError"),
        ({"lora_alpha": "much"}, "not a LoRA config .TypeError"),
        ({"rank_pattern": {"(": 2}}, "not a LoRA config"),
        ({"rank_pattern": [1]}, "not a LoRA config"),
        ({"lora_dropout": "much"}, "lora_dropout is 'much', no number"),
        ({"two\nlines": "two\nlines"}, "has no exact form here"),
        ({"use_dora": True}, "has a, b of the matrices a, b, m alone"),
    ],
)
def test_what_has_no_exact_form_is_one_line(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write_peft(tmp_path, lora_pair(Q), **options)
    with pytest.raises(ValueError, match=message) as error:
        peft.read(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lm_head.weight", "base_model.model.lm_head.weight is no LoRA matrix"),
        (f"{Q}.lora_B.bias", "lora_B.bias is no LoRA matrix"),
        (f"{V}.lora_A.weight", "v_proj has a of the matrices"),
    ],
)
def test_foreign_tensors_are_one_line(tmp_path: Path, name: str, message: str) -> None:
    write_peft(tmp_path, lora_pair(Q) | {name: np.ones((4, 4), np.float32)})
    with pytest.raises(ValueError, match=message) as error:
        peft.read(tmp_path)
    assert "\n" not in str(error.value)


def test_matrices_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    write_peft(tmp_path, lora_pair(Q) | {f"{Q}.lora_B.weight": np.ones((32, 3), np.float32)})
    with pytest.raises(ValueError, match=r"q_proj: A \(32, 4\), B \(3, 32\) do not fit together"):
        peft.read(tmp_path)


def test_a_convolution_is_refused(tmp_path: Path) -> None:
    a, b = np.ones((4, 3, 2, 2), np.float32), np.ones((5, 4, 1, 1), np.float32)
    write_peft(tmp_path, {"model.conv.lora_A.weight": a, "model.conv.lora_B.weight": b})
    with pytest.raises(ValueError, match=r"model.conv is no linear module or embedding"):
        peft.read(tmp_path)


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    write_peft(tmp_path, lora_pair(Q))
    weights = tmp_path / peft.WEIGHTS_FILE
    content = weights.read_bytes()
    for cut in (len(content) - 100, 50, 4, 0):
        weights.write_bytes(content[:cut])
        with pytest.raises(ValueError, match="damaged: not safetensors") as error:
            peft.read(tmp_path)
        assert "\n" not in str(error.value)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin: pickled, .*save_pretrained \(safetensors\)"):
        peft.read(tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: no such file"):
        peft.read(tmp_path)
    (tmp_path / peft.CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json:1: damaged: not JSON"):
        peft.read(tmp_path)


def test_an_embedding_its_tied_head_and_its_copy_must_agree(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_base(tiny_llama)[0]
    name = "model.embed_tokens"
    pair = lora_pair("x", width=258, rows=32)
    a, b = pair["x.lora_A.weight"], pair["x.lora_B.weight"]
    tensors = {
        f"{name}.lora_embedding_A": a,
        f"{name}.lora_embedding_B": b,
        "lm_head.lora_A.weight": np.ascontiguousarray(b.T),
        "lm_head.lora_B.weight": np.ascontiguousarray(a.T),
        f"{name}.base_layer.weight": np.array(model.model.embed_tokens.weight),
    }
    write_peft(tmp_path, tensors)
    assert sorted(peft.read(tmp_path, model=model).arrays) == [f"{name}.lora_a", f"{name}.lora_b"]
    write_peft(tmp_path, tensors | {"lm_head.lora_A.weight": np.ascontiguousarray(2 * b.T)})
    with pytest.raises(ValueError, match=r"adapts model.embed_tokens and not its head with it"):
        peft.read(tmp_path, model=model)
    write_peft(tmp_path, tensors, alpha_pattern={"lm_head": 3})
    with pytest.raises(ValueError, match=r"adapts model.embed_tokens and not its head with it"):
        peft.read(tmp_path, model=model)
    write_peft(tmp_path, tensors | {f"{name}.base_layer.weight": np.ones((258, 32), np.float32)})
    with pytest.raises(ValueError, match=r"its model.embed_tokens differs from the base model's; is it another base\?"):
        peft.read(tmp_path, model=model)
