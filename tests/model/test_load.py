"""Head and embedding of a base model: tied or apart, as its weights have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest

from stages.model.load import load_base
from tests.support.tiny import write_model

import mlx.core as mx  # isort: skip  the BLAS comes before MLX

IDS = mx.array([[3, 1, 4, 1, 5]])


def weights_of(folder: Path) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], mx.load(str(folder / "model.safetensors")))


def rewrite(folder: Path, *, head: str, tied: bool | None) -> Path:
    """Give a checkpoint a head of its `own`, a `copy` of the embedding or `none`, and let its config say this of it."""
    weights = weights_of(folder)
    (name,) = (name for name in weights if name.endswith("embed_tokens.weight"))
    weights.pop("lm_head.weight", None)
    if head != "none":
        weights["lm_head.weight"] = weights[name] + (0.1 if head == "own" else 0) * mx.arange(32)
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config | ({} if tied is None else {"tie_word_embeddings": tied})))
    return folder


def logits(folder: Path) -> mx.array:
    return load_base(folder, dtype="float32")[0](IDS)


def expected(folder: Path) -> mx.array:
    """The logits by the head that the file holds."""
    model, _ = load_base(folder, dtype="float32")
    return model.model(IDS) @ weights_of(folder)["lm_head.weight"].T


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mixtral", "phi3", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, None, False])
def test_a_head_of_its_own_is_used_whatever_the_config_says(
    tmp_path: Path, architecture: str, tied: bool | None
) -> None:
    folder = rewrite(write_model(tmp_path, architecture), head="own", tied=tied)
    mx.eval(wanted := expected(folder))
    assert mx.allclose(logits(folder), wanted, atol=1e-4)
    config = load_base(folder, dtype="float32")[1]
    assert config["tie_word_embeddings"] is False  # so that a merged model is read as it was written


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mixtral"])
def test_a_head_that_repeats_the_embedding_stays_tied(tmp_path: Path, architecture: str) -> None:
    folder = rewrite(write_model(tmp_path, architecture), head="copy", tied=True)
    model, config = load_base(folder, dtype="float32")
    assert "lm_head" not in model and config["tie_word_embeddings"] is True
    assert mx.allclose(model(IDS), expected(folder), atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mixtral", "phi3", "gemma", "gemma3_text", "minicpm"])
def test_a_missing_head_is_refused_if_the_config_says_there_is_one(tmp_path: Path, architecture: str) -> None:
    folder = rewrite(write_model(tmp_path, architecture), head="none", tied=False)
    with pytest.raises(ValueError, match=r"tie_word_embeddings: false, but the weights hold no lm_head") as failure:
        load_base(folder)
    assert str(failure.value).startswith(f"{folder}: ") and "\n" not in str(failure.value)


def test_a_packed_checkpoint_with_a_head_of_its_own_is_not_tied(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama", quantize=True, tie_word_embeddings=False)
    apart = logits(folder)
    mx.eval(apart)
    content = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(content))
    assert mx.array_equal(logits(folder), apart)


def test_a_head_that_the_architecture_has_no_place_for_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = rewrite(write_model(tmp_path, "gemma"), head="own", tied=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight") as failure:
        load_base(folder)
    assert "\n" not in str(failure.value)


def test_weights_of_another_shape_than_the_config_has_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama")
    content = json.loads((folder / "config.json").read_text()) | {"vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"\(300, ?32\)") as failure:
        load_base(folder)
    assert str(failure.value).startswith(f"{folder}: ") and "\n" not in str(failure.value)


def test_a_config_that_lacks_a_key_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = rewrite(write_model(tmp_path, "qwen3"), head="none", tied=None)
    with pytest.raises(ValueError, match=r"missing 1 required .* 'tie_word_embeddings'"):
        load_base(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_config_is_named(tmp_path: Path, content: bytes) -> None:
    folder = write_model(tmp_path, "llama")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"^{folder}/config\.json(:1)?: damaged: not .*; the folder needs a whole copy"
    ):
        load_base(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 20_000])
def test_damaged_weights_are_named(tmp_path: Path, kept: int) -> None:
    folder = write_model(tmp_path, "llama")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:kept])
    with pytest.raises(ValueError, match=rf"^{folder}/model\.safetensors: damaged: .*; the folder needs a whole copy"):
        mx.eval(load_base(folder)[0].parameters())
