"""PEFT on PyTorch gives our logits with our adapters, and we give PEFT's with its own (`make test-peers`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from stages.adapters import find
from stages.formats.base import Base
from stages.formats.export import export
from stages.lora import adapter, adapter_files
from stages.model.load import load_base
from tests.support.adapters import configure, fill
from tests.support.tiny import write_model

# What these libraries deprecate in each other is theirs to correct.
pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
TOKENS = [[1, 2, 3, 44, 250, 7, 0, 255], [9, 8, 7, 6, 5, 4, 3, 2]]
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),  # its head is its embedding
    "llama with a head": ("llama", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"head_dim": 8}),  # its embedding is scaled
    "phi3": ("phi3", {"pad_token_id": 256}),
    "mixtral": ("mixtral", {}),
}


def base_folder(folder: Path, name: str) -> Path:
    architecture, changes = BASES[name]
    return write_model(folder, architecture, **changes)


def torch_base(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def torch_logits(model: Any) -> np.ndarray:
    import torch

    model.eval()
    with torch.no_grad():
        return np.array(model(torch.tensor(TOKENS)).logits)


def our_logits(folder: Path, adapter_folder: Path) -> np.ndarray:
    model = load_base(folder)[0]
    saved = find.read(adapter_folder, model=model)
    adapter.put(model, saved)
    model.eval()
    return np.array(model(mx.array(TOKENS)))


def assert_same(ours: np.ndarray, theirs: np.ndarray, bare: np.ndarray) -> None:
    assert np.abs(theirs - bare).max() > 1e-2, "the adapter does nothing"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"targets": ["all-linear"]}),
        ("llama", {"targets": ["all-linear"], "type": "dora"}),
        ("llama", {"targets": ["q_proj", "embed_tokens"]}),
        ("llama with a head", {"targets": ["q_proj", "embed_tokens", "lm_head"], "layers": [0, 2]}),
        ("qwen2", {"targets": ["all-linear"], "rank_stabilized": True, "layers": [1]}),
        ("qwen3", {"targets": ["q_proj", "down_proj", "lm_head"], "type": "dora", "layers": "all"}),
        ("gemma2", {"targets": ["q_proj", "embed_tokens"]}),
        ("phi3", {"targets": ["qkv_proj", "gate_up_proj", "o_proj"]}),
        ("phi3", {"targets": ["qkv_proj"], "type": "dora"}),
        ("mixtral", {"targets": ["q_proj", "o_proj"]}),
        ("mixtral", {"targets": ["q_proj", "block_sparse_moe.gate"]}),
    ],
    ids=str,
)
def test_peft_gives_our_logits(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    from peft import PeftModel

    folder = base_folder(tmp_path / "base", name)
    model = load_base(folder)[0]
    config = configure(model, **options)
    adapter.attach(model, config, seed=0)
    fill_small(model)
    adapter.save(tmp_path / "ours", model, config)
    proof = export(adapter_files.read(tmp_path / "ours"), tmp_path / "peft", "peft", Base(model=load_base(folder)[0]))
    assert proof.is_exact

    bare = torch_logits(torch_base(folder))
    theirs = torch_logits(PeftModel.from_pretrained(torch_base(folder), tmp_path / "peft"))
    assert_same(our_logits(folder, tmp_path / "ours"), theirs, bare)
    assert_same(our_logits(folder, tmp_path / "peft"), theirs, bare)


def fill_small(model: Any) -> None:
    """Random values that leave the attention's scores as they are about: unequal ones magnify rounding."""
    fill(model)
    arrays = adapter.weights(model)
    # DoRA's norms must stay near the rows' own.
    small = [(name, 0.1 * array) for name, array in arrays.items() if not name.endswith(".m")]
    small += [(name, mx.abs(array) + 0.5) for name, array in arrays.items() if name.endswith(".m")]
    model.load_weights(small, strict=False)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
        ("llama", {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 5}),
        ("llama", {"target_modules": ["q_proj", "up_proj"], "use_dora": True, "layers_to_transform": [0, 2]}),
        (
            "llama",
            {
                "target_modules": ["q_proj", "v_proj", "o_proj"],
                "rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 7},
                "alpha_pattern": {"o_proj": 3},
                "use_rslora": True,
            },
        ),
        (
            "llama",
            {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 7}, "use_dora": True},
        ),
        ("llama with a head", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ("qwen2", {"target_modules": ["k_proj", "v_proj"], "layers_to_transform": [1]}),
        ("qwen3", {"target_modules": r".*\.0\.self_attn\.[qk]_proj|.*\.2\.mlp\.up_proj"}),
        ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"], "lora_alpha": 3}),
        ("mixtral", {"target_modules": ["q_proj", "v_proj"]}),
        ("mixtral", {"target_modules": ["q_proj", "gate"]}),
    ],
    ids=str,
)
def test_we_give_the_logits_of_an_adapter_that_peft_made(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    folder = base_folder(tmp_path / "base", name)
    bare = torch_logits(torch_base(folder))
    theirs = made_by_peft(folder, tmp_path / "peft", options)
    assert_same(our_logits(folder, tmp_path / "peft"), theirs, bare)

    base = Base(model=load_base(folder)[0])
    export(find.read(tmp_path / "peft", model=base.model), tmp_path / "mlx", "mlx", base)
    assert_same(our_logits(folder, tmp_path / "mlx"), theirs, bare)


def made_by_peft(folder: Path, out: Path, options: dict[str, Any]) -> np.ndarray:
    """An adapter with random matrices, saved by PEFT, and the logits with it."""
    import peft
    import torch

    torch.manual_seed(0)
    plain: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(torch_base(folder), peft.LoraConfig(**(plain | options)))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_magnitude" in parameter_name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif "lora_" in parameter_name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(out)
    return torch_logits(model)


def test_an_embedding_that_peft_adapts_without_its_tied_head_is_refused(tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "base", "llama")
    made_by_peft(folder, tmp_path / "peft", {"target_modules": ["q_proj", "embed_tokens"]})
    with pytest.raises(ValueError, match=r"adapts model.embed_tokens and not its head with it"):
        our_logits(folder, tmp_path / "peft")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
def test_what_has_no_exact_form_is_refused_by_name(tmp_path: Path, options: dict[str, Any], name: str) -> None:
    folder = base_folder(tmp_path / "base", "llama with a head")
    made_by_peft(folder, tmp_path / "peft", {"target_modules": ["q_proj"]} | options)
    with pytest.raises(ValueError, match=rf"adapter_config.json: {name} \(.*merge_and_unload") as error:
        find.read(tmp_path / "peft")
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # PEFT's own pattern for the experts matches nothing
def test_experts_that_peft_adapts_are_refused_by_name(tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "base", "mixtral")
    made_by_peft(folder, tmp_path / "peft", {"target_modules": ["q_proj", "w1", "w2", "w3"]})
    with pytest.raises(ValueError, match=r"adapter_config.json: target_parameters \(.*merge_and_unload"):
        our_logits(folder, tmp_path / "peft")


def test_other_methods_are_refused_by_name(tmp_path: Path) -> None:
    import peft

    folder = base_folder(tmp_path / "base", "llama")
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    peft.get_peft_model(torch_base(folder), config).save_pretrained(tmp_path / "peft")
    with pytest.raises(ValueError, match="peft_type is 'IA3', 'LORA' is read"):
        find.read(tmp_path / "peft")
