"""GGUF files in llama.cpp itself (`make test-peers`): the same tokens, the same probabilities, the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from stages.formats.gguf_adapter import export_adapter
from stages.formats.gguf_model import export_model
from stages.lora import adapter, lora_config
from stages.model.load import load_base
from stages.sources.gguf import convert
from stages.templating.tokenizer import load_tokenizer
from tests.support import gguf_tokenizers
from tests.support.adapters import configure, fill
from tests.support.gguf_blocks import KINDS, repacked
from tests.support.gguf_models import ARCHITECTURES, write_exportable
from tests.support.gguf_tokenizers import TEXTS, VOCABULARY
from tests.support.llama_cpp import serving

pytestmark = pytest.mark.peers
PROMPTS = [[int(i) for i in np.random.default_rng(length).integers(4, VOCABULARY, length)] for length in (3, 24, 40)]
TOKENS = 4


def by_mlx(model: Any, prompt: list[int], answer: list[int]) -> np.ndarray:
    """Log-probabilities at each place of an answer that is not empty, (tokens, V)."""
    logits = model(mx.array([[*prompt, *answer[:-1]]]))[0, len(prompt) - 1 :].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def assert_agrees(
    model: Any,
    file: Path,
    *,
    within: float,
    adapter: Path | None = None,
    prompts: list[list[int]] = PROMPTS,
    context: int = 256,
    of_range: bool = False,
) -> None:
    """llama.cpp's greedy answer is MLX's, and the log-probabilities of all tokens at all its places agree.

    They may differ by `within` nats, or by that share of what lies between the largest and the smallest.
    """
    with serving(file, adapter=adapter, context=context) as llama:
        answered = [llama.generate(prompt, tokens=TOKENS) for prompt in prompts]
    for prompt, (answer, theirs) in zip(prompts, answered, strict=True):
        ours = by_mlx(model, prompt, answer)
        allowed = within * (float(np.ptp(ours)) if of_range else 1)
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=allowed)
        chosen = ours[np.arange(len(answer)), answer]
        assert (chosen >= ours.max(axis=-1) - allowed).all()  # the same choices, but for ties


def filled_adapter(folder: Path, out: Path) -> tuple[Any, lora_config.LoraConfig]:
    """A model with an adapter on all its matrices, which changes the answers, saved to `out`."""
    model = load_base(folder)[0]
    targets = ["all-linear", "lm_head"] if "lm_head" in model else ["all-linear"]
    config = configure(model, targets=targets, alpha=0.5)
    adapter.attach(model, config, seed=0)
    fill(model)
    adapter.save(out, model, config)
    return model, config


# Llama itself, in f32 and with an adapter, is among the targets of test_targets_peers.py.
OTHERS = ARCHITECTURES[1:]
# llama.cpp rounds GELU to float16 on a CPU.
WITHIN = {architecture: 0.03 if architecture == "gemma3_text" else 2e-4 for architecture in ARCHITECTURES}


@pytest.mark.parametrize("architecture", OTHERS)
def test_llama_cpp_computes_what_mlx_does(tmp_path: Path, architecture: str) -> None:
    folder = write_exportable(tmp_path / "model", architecture)
    export_model(folder, tmp_path / "model.gguf", dtype="f32")
    assert_agrees(load_base(folder)[0], tmp_path / "model.gguf", within=WITHIN[architecture])


_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "own head": ("llama", {"tie_word_embeddings": False}),
    "mistral": ("llama", {"model_type": "mistral"}),
    "width of heads": ("llama", {"head_dim": 64}),
    "attention bias": ("llama", {"attention_bias": True}),
    "linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama3": ("llama", {"rope_scaling": _LLAMA3 | {"original_max_position_embeddings": 64}}),
    "linear qwen2": ("qwen2", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "yarn": ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}),
    "part of a head": ("phi3", {"head_dim": None, "partial_rotary_factor": 0.5}),
    "linear gemma": ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "other pattern": ("gemma3_text", {"sliding_window_pattern": 3}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_an_architecture_agree(tmp_path: Path, variant: str) -> None:
    architecture, changes = VARIANTS[variant]
    folder = write_exportable(tmp_path / "model", architecture, **changes)
    export_model(folder, tmp_path / "model.gguf", dtype="f32")
    assert_agrees(load_base(folder)[0], tmp_path / "model.gguf", within=WITHIN[architecture])


def test_packed_model_agrees_after_unpacking(tmp_path: Path) -> None:
    folder = write_exportable(tmp_path / "model", "llama", quantize=True)
    export_model(folder, tmp_path / "model.gguf", dtype="f32")
    assert_agrees(load_base(folder)[0], tmp_path / "model.gguf", within=2e-4)


@pytest.mark.parametrize(("context", "length"), [(256, 40), (512, 300)])
def test_long_context_phi3_agrees_below_and_beyond_its_first_context(tmp_path: Path, context: int, length: int) -> None:
    factors = np.linspace(1, 4, 16)
    scaling = {"type": "longrope", "short_factor": factors.tolist(), "long_factor": (3 * factors).tolist()}
    changes = {"original_max_position_embeddings": 256, "max_position_embeddings": 1024, "rope_scaling": scaling}
    folder = write_exportable(tmp_path / "model", "phi3", **changes)
    export_model(folder, tmp_path / "model.gguf", dtype="f32")
    prompts = [[int(i) for i in np.random.default_rng(0).integers(4, VOCABULARY, length)]]
    assert_agrees(load_base(folder)[0], tmp_path / "model.gguf", within=2e-4, prompts=prompts, context=context)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_type_of_file_is_near_mlx(tmp_path: Path, architecture: str, dtype: str) -> None:
    folder = write_exportable(tmp_path / "model", architecture, dtype="bfloat16" if dtype == "bf16" else "float16")
    export_model(folder, tmp_path / "model.gguf", dtype=dtype)
    assert_agrees(load_base(folder)[0], tmp_path / "model.gguf", within=0.2 if dtype == "q8_0" else 0.1)


@pytest.mark.parametrize("architecture", OTHERS)
def test_adapter_in_llama_cpp_computes_what_it_does_in_mlx(tmp_path: Path, architecture: str) -> None:
    folder = write_exportable(tmp_path / "model", architecture)
    export_model(folder, tmp_path / "model.gguf", dtype="f32")
    model, _ = filled_adapter(folder, tmp_path / "adapter")
    plain = by_mlx(load_base(folder)[0], PROMPTS[1], [0])
    assert np.abs(by_mlx(model, PROMPTS[1], [0]) - plain).max() > 0.5
    export_adapter(tmp_path / "adapter", folder, tmp_path / "adapter.gguf")
    assert_agrees(model, tmp_path / "model.gguf", within=WITHIN[architecture], adapter=tmp_path / "adapter.gguf")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_file_of_any_quantisation_computes_the_same_as_a_base_model(tmp_path: Path, kind: Any) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    folder = write_exportable(tmp_path / "model", "llama", **sizes)
    export_model(folder, tmp_path / "plain.gguf", dtype="f32")
    repacked(tmp_path / "plain.gguf", tmp_path / "packed.gguf", kind)
    convert(tmp_path / "packed.gguf", tmp_path / "back")
    # llama.cpp rounds activations to 8 bits before it multiplies them with packed weights.
    assert_agrees(load_base(tmp_path / "back")[0], tmp_path / "packed.gguf", within=0.06, of_range=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_are_the_tokenizers_own(tmp_path: Path, architecture: str) -> None:
    folder = write_exportable(tmp_path / "model", architecture)
    export_model(folder, tmp_path / "model.gguf", dtype="f16")
    assert_same_tokens(folder, tmp_path / "model.gguf")


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "gpt-4o", "tekken"])
def test_each_pre_tokenizer_is_llama_cpps(tmp_path: Path, pre: str) -> None:
    folder = write_exportable(tmp_path / "model", "llama")
    gguf_tokenizers.write_byte_level(folder, pre, bos=pre == "llama-bpe")
    export_model(folder, tmp_path / "model.gguf", dtype="f16")
    assert_same_tokens(folder, tmp_path / "model.gguf")


def assert_same_tokens(folder: Path, file: Path) -> None:
    tokenizer = load_tokenizer(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": TEXTS["korean"]}], tokenize=False)
    with serving(file) as llama:
        for name, text in TEXTS.items():
            assert llama.tokens(text) == tokenizer.encode(text, add_special_tokens=False), name
            assert llama.tokens(text, bos=True) == tokenizer.encode(text), name
        assert llama.tokens(chat, special=True) == tokenizer.encode(chat, add_special_tokens=False)
        ask = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
        )
        assert llama.chat("Hi") == ask
