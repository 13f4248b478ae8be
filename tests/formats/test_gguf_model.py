"""A model directory → GGUF → a model directory: the same logits; and what has no form is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from stages.formats import gguf_file
from stages.formats.gguf_model import export_model, model_tensors
from stages.formats.gguf_source import open_source
from stages.model.load import load_base
from stages.sources.gguf import convert
from stages.sources.gguf_architectures import ARCHITECTURES as KNOWN
from stages.sources.gguf_architectures import permute, unpermute
from stages.templating.tokenizer import load_tokenizer
from tests.support import gguf_tokenizers
from tests.support.gguf_models import ARCHITECTURES, write_exportable
from tests.support.gguf_tokenizers import TEXTS, VOCABULARY
from tests.support.tiny import write_model

IDS = mx.array([[7, 100, 3, 250, 42, 42, 9, 17, 301, 5, 80, 81]])


def logits(folder: Path) -> np.ndarray:
    return np.array(load_base(folder, dtype="float32")[0](IDS))


def there_and_back(folder: Path, root: Path, dtype: str) -> Path:
    export_model(folder, root / "model.gguf", dtype=dtype)
    convert(root / "model.gguf", root / "back")
    return root / "back"


# --- there and back ---


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip_gives_the_same_logits(tmp_path: Path, architecture: str, dtype: str) -> None:
    kinds = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
    folder = write_exportable(tmp_path / "model", architecture, dtype=kinds[dtype])
    back = there_and_back(folder, tmp_path, dtype)
    np.testing.assert_allclose(logits(back), logits(folder), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip_through_q8_0_is_near(tmp_path: Path, architecture: str) -> None:
    folder = write_exportable(tmp_path / "model", architecture)
    wanted, found = logits(folder), logits(there_and_back(folder, tmp_path, "q8_0"))
    difference = np.abs(found - wanted).max()
    assert 0 < difference < 0.02 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"head_dim": 64}),
        ("llama", {"attention_bias": True}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
        (
            "llama",
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 32.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
                "rope_theta": 500000.0,
            },
        ),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}),
        ("phi3", {"head_dim": None, "partial_rotary_factor": 0.5}),
        (
            "phi3",
            {
                "original_max_position_embeddings": 256,
                "max_position_embeddings": 1024,
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1.0 + i / 16 for i in range(16)],
                    "long_factor": [2.0 + i for i in range(16)],
                },
            },
        ),
        ("gemma3_text", {"sliding_window_pattern": 3}),
    ],
)
def test_round_trip_keeps_what_a_config_changes(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    folder = write_exportable(tmp_path / "model", architecture, **changes)
    back = there_and_back(folder, tmp_path, "f32")
    np.testing.assert_allclose(logits(back), logits(folder), rtol=0, atol=1e-5)


def test_packed_model_is_unpacked(tmp_path: Path) -> None:
    folder = write_exportable(tmp_path / "model", "qwen3", quantize=True)
    back = there_and_back(folder, tmp_path, "f32")
    assert "quantization" not in json.loads((back / "config.json").read_text(encoding="utf-8"))
    np.testing.assert_allclose(logits(back), logits(folder), rtol=0, atol=1e-4)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "gpt-4o", "tekken"])
def test_byte_level_tokenizer_comes_back(tmp_path: Path, pre: str) -> None:
    folder = write_exportable(tmp_path / "model", "llama")
    gguf_tokenizers.write_byte_level(folder, pre, bos=True)
    assert_same_tokenizer(folder, there_and_back(folder, tmp_path, "f16"))


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizer_comes_back(tmp_path: Path, prefix: bool) -> None:
    folder = write_exportable(tmp_path / "model", "llama")
    gguf_tokenizers.write_sentencepiece(folder, prefix=prefix)
    assert_same_tokenizer(folder, there_and_back(folder, tmp_path, "f16"))


def assert_same_tokenizer(folder: Path, back: Path) -> None:
    ours, theirs = load_tokenizer(folder), load_tokenizer(back)
    for text in TEXTS.values():
        ids = ours.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == ours.decode(ids)
    message = [{"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(message, tokenize=False) == ours.apply_chat_template(message, tokenize=False)
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (
        ours.eos_token_id,
        ours.bos_token_id,
        ours.pad_token_id,
        ours.unk_token_id,
    )


# --- the file ---


def test_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = write_exportable(tmp_path / "model", "llama")
    summaries = [export_model(folder, tmp_path / f"{i}.gguf", dtype="q8_0") for i in range(2)]
    assert summaries[0] == summaries[1]
    assert summaries[0].size == (tmp_path / "0.gguf").stat().st_size
    assert (tmp_path / "0.gguf").read_bytes() == (tmp_path / "1.gguf").read_bytes()


@pytest.mark.parametrize(("dtype", "kind"), [("f32", Kind.F32), ("f16", Kind.F16), ("q8_0", Kind.Q8_0)])
def test_matrices_have_the_type_and_vectors_are_float32(tmp_path: Path, dtype: str, kind: Kind) -> None:
    folder = write_exportable(tmp_path / "model", "qwen2")
    export_model(folder, tmp_path / "model.gguf", dtype=dtype)
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == kind
    assert kinds["blk.0.attn_q.bias"] == kinds["output_norm.weight"] == Kind.F32


def test_row_that_fills_no_whole_blocks_is_float16_in_a_q8_0_file(tmp_path: Path) -> None:
    folder = write_exportable(tmp_path / "model", "llama", intermediate_size=80)
    export_model(folder, tmp_path / "model.gguf", dtype="q8_0")
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == Kind.F16
    assert kinds["blk.0.ffn_up.weight"] == Kind.Q8_0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_llama_cpps(tmp_path: Path, architecture: str) -> None:
    source = open_source(write_exportable(tmp_path / "model", architecture))
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == source.architecture.name)
    names = gguf.get_tensor_name_map(kind, source.args.num_hidden_layers)
    for hf in source.architecture.modules:
        assert source.architecture.gguf_module(f"model.layers.1.{hf}") == names.get_name(f"model.layers.1.{hf}")


def test_every_module_has_one_name_each_way() -> None:
    for architecture in KNOWN:
        for module in [*(f"model.layers.12.{each}" for each in architecture.modules), "model.norm", "lm_head"]:
            target = architecture.gguf_module(module)
            assert target is not None
            assert architecture.hf_module(target) == module


def test_permuting_is_undone() -> None:
    rows = np.random.default_rng(0).normal(size=(48, 5))
    assert not np.array_equal(permute(rows, heads=3), rows)
    np.testing.assert_array_equal(unpermute(permute(rows, heads=3), heads=3), rows)


# --- the proof ---


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_file_that_differs_in_one_value_is_refused(tmp_path: Path, dtype: str) -> None:
    source = open_source(write_exportable(tmp_path / "model", "llama"))
    tensors = model_tensors(source, dtype)
    path = tmp_path / "model.gguf"
    gguf_file.write(path, "llama", {"general.name": "x"}, tensors)
    gguf_file.verify(path, {"general.name": "x"}, tensors)
    place = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.attn_q.weight").data_offset
    content = bytearray(path.read_bytes())
    content[place + 3] ^= 0x7F
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"blk\.1\.attn_q\.weight reads back with other values"):
        gguf_file.verify(path, {"general.name": "x"}, tensors)


def test_rows_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    source = open_source(write_exportable(tmp_path / "model", "llama"))
    tensors = model_tensors(source, "f32")
    path = tmp_path / "model.gguf"
    plain = [gguf_file.Tensor(t.name, t.shape, t.kind, t.read) for t in tensors]
    gguf_file.write(path, "llama", {}, plain)
    with pytest.raises(ValueError, match="reads back with other values"):
        gguf_file.verify(path, {}, tensors)


def test_other_metadata_is_refused(tmp_path: Path) -> None:
    gguf_file.write(tmp_path / "model.gguf", "llama", {"llama.block_count": 2}, [])
    with pytest.raises(ValueError, match=r"llama\.block_count reads back as another value"):
        gguf_file.verify(tmp_path / "model.gguf", {"llama.block_count": 3}, [])


# --- refusals ---


def refused(tmp_path: Path, folder: Path, match: str, dtype: str = "f16") -> None:
    (tmp_path / "model.gguf").write_bytes(b"what was there")
    with pytest.raises(ValueError, match=match) as caught:
        export_model(folder, tmp_path / "model.gguf", dtype=dtype)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "model.gguf").read_bytes() == b"what was there"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("architecture", ["gemma2", "mixtral", "cohere"])
def test_architecture_without_a_proven_form_is_refused(tmp_path: Path, architecture: str) -> None:
    folder = write_model(tmp_path / "model", architecture)
    refused(tmp_path, folder, f"architecture '{architecture}'; convert it with .*convert_hf_to_gguf.py")


@pytest.mark.parametrize(
    ("architecture", "changes", "problem"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window: true"),
        ("qwen3", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling of the type 'dynamic'"),
        (
            "qwen2",
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                    "beta_fast": 16,
                }
            },
            "rope_scaling of the type 'yarn'",
        ),
        ("gemma3_text", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64"),
        ("llama", {"mlp_bias": True}, r"the tensor model\.layers\.\d\.mlp\.\w+\.bias"),
    ],
)
def test_option_without_a_proven_form_is_refused(
    tmp_path: Path, architecture: str, changes: dict[str, Any], problem: str
) -> None:
    refused(tmp_path, write_exportable(tmp_path / "model", architecture, **changes), problem)


def test_unknown_pre_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_exportable(tmp_path / "model", "llama")
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Whitespace"})
    path.write_text(json.dumps(state), encoding="utf-8")
    refused(tmp_path, folder, "pre-tokenizer is none of those known here")


def test_unigram_tokenizer_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    folder = write_exportable(tmp_path / "model", "llama")
    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("<|im_end|>", -2.0)], unk_id=0))
    made.save(str(folder / "tokenizer.json"))
    refused(tmp_path, folder, "tokenizer of the type Unigram")


def test_merges_that_scores_cannot_say_are_refused(tmp_path: Path) -> None:
    folder = write_exportable(tmp_path / "model", "phi3")
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["model"]["merges"] = state["model"]["merges"][1:]
    path.write_text(json.dumps(state), encoding="utf-8")
    refused(tmp_path, folder, "its merges are no SentencePiece model's")


def test_value_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    folder = write_exportable(tmp_path / "model", "llama")
    change(folder, "model.layers.0.mlp.up_proj.weight", 1e6)
    refused(tmp_path, folder, r"blk\.0\.ffn_up\.weight: holds 1e\+06, too large for f16")
    export_model(folder, tmp_path / "model.gguf", dtype="bf16")


def test_value_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    folder = write_exportable(tmp_path / "model", "llama")
    change(folder, "model.layers.0.mlp.up_proj.weight", float("nan"))
    refused(tmp_path, folder, r"blk\.0\.ffn_up\.weight: holds a value that is not finite", dtype="f32")


def weights_of(folder: Path) -> dict[str, mx.array]:
    weights = cast(dict[str, mx.array], mx.load(str(folder / "model.safetensors")))
    mx.eval(weights)  # the file is written anew
    return weights


def change(folder: Path, name: str, value: float) -> None:
    weights = weights_of(folder)
    weights[name][0, 0] = mx.array(value)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = write_exportable(tmp_path / "model", "llama")
    weights = weights_of(folder)
    del weights["model.layers.1.mlp.up_proj.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    refused(tmp_path, folder, r"lacks the tensor blk\.1\.ffn_up\.weight")


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, write_exportable(tmp_path / "model", "llama"), "'q4_k_m' is none of", dtype="q4_k_m")


def test_embedding_without_tokens_is_filled_up(tmp_path: Path) -> None:
    folder = write_exportable(tmp_path / "model", "llama", vocab_size=VOCABULARY + 64)
    export_model(folder, tmp_path / "model.gguf", dtype="f16")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tokens, types = (reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    assert len(tokens) == len(types) == VOCABULARY + 64
    assert set(types[VOCABULARY:]) == {5}
