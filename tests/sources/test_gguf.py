"""GGUF → model directory, held against a Llama in NumPy that computes as llama.cpp does, from the file's own blocks.

The files are written here, by hand. Source: the GGUF specification, version 3, and the block layouts of ggml's Q4_0,
Q4_1 and Q8_0.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from stages.sources import gguf
from stages.sources.gguf_architectures import unpermute
from tests.support.gguf_files import (
    EPSILON,
    F16,
    F32,
    HEAD_DIM,
    HEADS,
    KINDS,
    KV_HEADS,
    LAYERS,
    Q4_1,
    Q8_0,
    SPECIALS,
    THETA,
    decode,
    metadata,
    tensors,
    tiny_gguf,
    tokens,
)

IDS = [7, 100, 3, 250, 42, 42, 9, 17]


# --- files to convert ---


# --- conversion ---


@pytest.fixture(scope="module", autouse=True)
def blas_before_mlx(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The process's first import of MLX may be this module's: whichever test follows wants its BLAS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORABUILD_STORE", str(tmp_path_factory.mktemp("store")))
        import stages.model  # noqa: F401


def converted(folder: Path, weights: dict[str, Any] | None = None, meta: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    gguf.convert(tiny_gguf(folder / "tiny.gguf", weights, meta), folder / "model")
    return folder / "model"


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return content


# --- a Llama as llama.cpp computes it ---


def rotate_pairs(x_LxHxD: np.ndarray, theta: float) -> np.ndarray:
    """llama.cpp's rotary embedding of a Llama: neighbours (2i, 2i + 1) turn together."""
    length, _, width = x_LxHxD.shape
    angles_LxD = np.arange(length)[:, None] * theta ** (-np.arange(0, width, 2) / width)
    cos, sin = np.cos(angles_LxD)[:, None], np.sin(angles_LxD)[:, None]
    even, odd = x_LxHxD[..., 0::2], x_LxHxD[..., 1::2]
    turned = np.empty_like(x_LxHxD)
    turned[..., 0::2], turned[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos
    return turned


def rotate_halves(x_LxHxD: np.ndarray, theta: float) -> np.ndarray:
    """The rotary embedding of the original Llama weights: (i, i + D/2) turn together."""
    length, _, width = x_LxHxD.shape
    angles_LxD = np.arange(length)[:, None] * theta ** (-np.arange(0, width, 2) / width)
    cos, sin = np.cos(angles_LxD)[:, None], np.sin(angles_LxD)[:, None]
    first, second = np.split(x_LxHxD, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def permute(rows: np.ndarray, *, heads: int) -> np.ndarray:
    """llama.cpp's `LlamaModel.permute`, in its own words."""
    shape = (heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape)


def reference_logits(weights: dict[str, Any], ids: list[int]) -> np.ndarray:
    """The logits (L, V) of the model in a GGUF, in float64."""
    w = {
        name.removesuffix(".weight"): decode(kind, array).astype(np.float64) for name, (kind, array) in weights.items()
    }

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * w[name]

    x = w["token_embd"][ids]
    length = len(ids)
    mask = np.triu(np.full((length, length), -np.inf), 1)
    for layer in range(LAYERS):
        name = f"blk.{layer}."
        h = norm(x, name + "attn_norm")
        q = rotate_pairs((h @ w[name + "attn_q"].T).reshape(length, HEADS, HEAD_DIM), THETA)
        k = rotate_pairs((h @ w[name + "attn_k"].T).reshape(length, KV_HEADS, HEAD_DIM), THETA)
        v = (h @ w[name + "attn_v"].T).reshape(length, KV_HEADS, HEAD_DIM)
        k, v = np.repeat(k, HEADS // KV_HEADS, axis=1), np.repeat(v, HEADS // KV_HEADS, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(HEAD_DIM) + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(length, -1) @ w[name + "attn_output"].T
        h = norm(x, name + "ffn_norm")
        gate = h @ w[name + "ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[name + "ffn_up"].T)) @ w[name + "ffn_down"].T
    return norm(x, "output_norm") @ w.get("output", w["token_embd"]).T


def mlx_logits(folder: Path, ids: list[int]) -> np.ndarray:
    """The logits (L, V) of the converted model, as mlx-lm loads it, computed in float32."""
    import mlx.core as mx
    from mlx_lm.utils import load

    model, _ = load(str(folder))
    model.set_dtype(mx.float32)
    logits: np.ndarray = np.array(model(mx.array([ids]))[0])
    return logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_converted_model_computes_what_llama_cpp_would(tmp_path: Path, kind: str, tied: bool) -> None:
    weights = tensors(KINDS[kind], tied=tied)
    expected = reference_logits(weights, IDS)
    logits = mlx_logits(converted(tmp_path, weights), IDS)
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def test_types_may_be_mixed_in_a_file(tmp_path: Path) -> None:
    weights = tensors(Q4_1, embedding=Q8_0) | {"blk.0.ffn_up.weight": (F16, tensors(F16)["blk.0.ffn_up.weight"][1])}
    expected = reference_logits(weights, IDS)
    folder = converted(tmp_path, weights)
    np.testing.assert_allclose(mlx_logits(folder, IDS), expected, rtol=0, atol=2e-4 * np.abs(expected).max())
    assert config_of(folder)["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
    }


@given(heads=st.integers(1, 6), half=st.integers(1, 8), width=st.integers(1, 4))
def test_unpermute_is_the_inverse_of_llama_cpps_permute(heads: int, half: int, width: int) -> None:
    rows = np.arange(heads * 2 * half * width).reshape(heads * 2 * half, width)
    np.testing.assert_array_equal(unpermute(permute(rows, heads=heads), heads=heads), rows)


def test_unpermuted_rows_score_alike_under_the_other_rotary_embedding() -> None:
    random = np.random.default_rng(0)
    q, k, x = (random.normal(size=shape) for shape in ((64, 8), (64, 8), (10, 8)))

    def scores(q: np.ndarray, k: np.ndarray, rotate: Any) -> np.ndarray:
        turned = (rotate((x @ rows.T).reshape(10, 4, 16), THETA) for rows in (q, k))
        result: np.ndarray = np.einsum("qhd,khd->hqk", *turned)
        return result

    original = scores(unpermute(q, heads=4), unpermute(k, heads=4), rotate_halves)
    np.testing.assert_allclose(original, scores(q, k, rotate_pairs), rtol=1e-10, atol=1e-10)


# --- files ---


def test_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = converted(tmp_path / "1"), converted(tmp_path / "2")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_order_of_tensors_in_the_file_does_not_matter(tmp_path: Path) -> None:
    weights = tensors(Q4_1)
    first = converted(tmp_path / "1", weights)
    second = converted(tmp_path / "2", dict(reversed(weights.items())))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blk.3.attn_q.weight", "model.layers.3.self_attn.q_proj.weight"),
        ("blk.12.attn_k.scales", "model.layers.12.self_attn.k_proj.scales"),
        ("blk.0.attn_v.biases", "model.layers.0.self_attn.v_proj.biases"),
        ("blk.0.attn_output.weight", "model.layers.0.self_attn.o_proj.weight"),
        ("blk.0.ffn_gate.weight", "model.layers.0.mlp.gate_proj.weight"),
        ("blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight"),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
        ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("output.weight", "lm_head.weight"),
    ],
)
def test_names_map(name: str, expected: str) -> None:
    assert gguf.hf_name(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        "rope_freqs.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.0.ffn_up.bias",
        "output.bias",
        "blk.x.attn_q.weight",
        "output",
    ],
)
def test_unknown_tensor_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{re.escape(name)}' has no place in a Llama"):
        gguf.hf_name(name)


def test_file_with_an_unknown_tensor_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    weights = tensors() | {"blk.0.ffn_gate_inp.weight": (F32, np.ones(8, np.float32))}
    with pytest.raises(ValueError, match=r"ffn_gate_inp\.weight"):
        converted(tmp_path, weights)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("architecture", ["mamba", None])
def test_other_architecture_is_refused(tmp_path: Path, architecture: str | None) -> None:
    with pytest.raises(ValueError, match=f"tiny.gguf holds a {architecture!r} model; only these convert: llama, "):
        converted(tmp_path, meta=metadata(general__architecture=architecture))


@pytest.mark.parametrize(("key", "value"), [("pre", "default"), ("model", "bert"), ("pre", None), ("model", None)])
def test_unknown_tokenizer_is_refused(tmp_path: Path, key: str, value: str | None) -> None:
    with pytest.raises(ValueError, match="is not one this conversion knows"):
        converted(tmp_path, meta=metadata(**{f"tokenizer__ggml__{key}": value}))


@pytest.mark.parametrize(
    "key",
    ["llama.block_count", "llama.attention.head_count", "tokenizer.ggml.tokens", "tokenizer.ggml.eos_token_id",
     "tokenizer.ggml.merges"],
)  # fmt: skip
def test_missing_metadata_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=f"the GGUF has no '{key}'"):
        converted(tmp_path, meta=metadata(**{key.replace(".", "__"): None}))


def test_scaled_rotary_embedding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scales its rotary embedding"):
        converted(tmp_path, meta=metadata(llama__rope__scaling__type="dynamic", llama__rope__scaling__factor=2.0))


def test_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"not one" * 100)
    with pytest.raises(ValueError, match=r"tiny\.gguf cannot be read as GGUF"):
        gguf.convert(tmp_path / "tiny.gguf", tmp_path / "model")


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.5, 0.999])
def test_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    whole = tiny_gguf(tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"tiny\.gguf cannot be read as GGUF"):
        gguf.convert(tmp_path / "tiny.gguf", tmp_path / "model")


# --- config ---


def test_config_says_what_the_metadata_says(tmp_path: Path) -> None:
    config = config_of(converted(tmp_path))
    wanted = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    wanted |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "vocab_size": len(tokens())}
    assert {key: config[key] for key in wanted} == wanted
    assert (config["rms_norm_eps"], config["rope_theta"]) == (EPSILON, THETA)
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


@pytest.mark.parametrize(
    ("key", "field", "value"),
    [
        ("llama__attention__head_count_kv", "num_key_value_heads", 4),
        ("llama__rope__dimension_count", "head_dim", 16),
        ("llama__rope__freq_base", "rope_theta", 10000.0),
        ("llama__vocab_size", "vocab_size", 262),
    ],
)
def test_metadata_that_may_be_left_out_has_the_specifications_default(
    tmp_path: Path, key: str, field: str, value: float
) -> None:
    assert config_of(converted(tmp_path, meta=metadata(**{key: None})))[field] == value


@pytest.mark.parametrize("tied", [True, False])
def test_file_without_an_output_tensor_has_tied_embeddings(tmp_path: Path, tied: bool) -> None:
    assert config_of(converted(tmp_path, tensors(tied=tied)))["tie_word_embeddings"] is tied


def test_unquantised_file_has_no_quantisation_in_its_config(tmp_path: Path) -> None:
    assert "quantization" not in config_of(converted(tmp_path, tensors(F16)))


def test_float32_weights_keep_their_values(tmp_path: Path) -> None:
    weights = tensors(F32)
    folder = converted(tmp_path, weights)
    saved = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(saved["model.layers.0.mlp.up_proj.weight"], weights["blk.0.ffn_up.weight"][1])
    assert config_of(folder)["torch_dtype"] == "float32"


def test_float32_weights_beyond_float16_stay_finite(tmp_path: Path) -> None:
    kind, array = tensors(F16)["output_norm.weight"]
    folder = converted(tmp_path, tensors(F16) | {"output_norm.weight": (kind, array * 1e6)})
    saved = load_file(folder / "model.safetensors")
    assert np.isfinite(saved["model.norm.weight"]).all()


def test_norms_that_float16_holds_are_halved(tmp_path: Path) -> None:
    folder = converted(tmp_path, tensors(Q4_1))
    saved = load_file(folder / "model.safetensors")
    assert saved["model.norm.weight"].dtype == np.float16
    assert config_of(folder)["torch_dtype"] == "float16"


# --- tokenizer ---


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(converted(tmp_path_factory.mktemp("gguf")))


@given(text=st.text(max_size=30).filter(lambda text: "<|" not in text))
def test_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_ids_are_the_files(tokenizer: Any) -> None:
    vocabulary = tokens()
    assert tokenizer.encode("a", add_special_tokens=False) == [vocabulary.index("a")]
    assert tokenizer.encode("he he", add_special_tokens=False) == [vocabulary.index("he"), vocabulary.index("Ġhe")]


def test_digits_are_never_merged(tokenizer: Any) -> None:
    vocabulary = tokens()
    assert tokenizer.encode("12", add_special_tokens=False) == [vocabulary.index("1"), vocabulary.index("2")]


@pytest.mark.parametrize(("i", "token"), list(enumerate(SPECIALS)))
def test_special_token_is_one_id_even_inside_text(tokenizer: Any, i: int, token: str) -> None:
    ids = tokenizer.encode(f"a{token}b", add_special_tokens=False)
    assert len(ids) == 3
    assert ids[1] == i


def test_special_tokens_are_left_out_of_decoded_text_on_demand(tokenizer: Any) -> None:
    ids = tokenizer.encode("a<|im_end|>", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a"


def test_nothing_is_put_before_a_text_unasked(tokenizer: Any) -> None:
    assert tokenizer.encode("a") == tokenizer.encode("a", add_special_tokens=False)


def test_end_of_sequence_is_the_files(tokenizer: Any) -> None:
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)


def test_chat_template_is_the_files(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False)
    assert text == "<|im_start|>he<|im_end|>"
