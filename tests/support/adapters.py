"""Adapters on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from stages.lora import adapter, lora_config
from stages.lora.execution import narrow_head
from stages.model.load import load_base
from stages.params import schema

KEYS = ("self_attn.q_proj", "self_attn.v_proj")


def config(**changes: Any) -> lora_config.LoraConfig:
    plain: dict[str, Any] = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": KEYS, "layers": 2, "type": "lora"}
    return lora_config.LoraConfig(**(plain | changes))


def configure(model: Any, **changes: Any) -> lora_config.LoraConfig:
    plain: dict[str, Any] = {
        "type": "lora",
        "rank": 4,
        "alpha": 8.0,
        "scale": None,
        "rank_stabilized": False,
        "dropout": 0.0,
        "targets": ["q_proj", "v_proj"],
        "layers": 2,
    }
    return lora_config.configure(model, schema.Lora.model_validate(plain | changes))


def fill(model: Any) -> None:
    """Give the zero B matrices values, so that the adapter does something."""
    arrays = [
        (name, mx.random.normal(array.shape, key=mx.random.key(i)))
        for i, (name, array) in enumerate(adapter.weights(model).items())
    ]
    model.load_weights(arrays, strict=False)


# As people name them: each architecture's own modules, the fused, the gate and the experts' among them.
TARGETS = {
    "llama": ["all-linear"],
    "qwen2": ["self_attn.*", "down_proj"],
    "qwen3": ["q_proj", "k_proj", "lm_head", "embed_tokens"],
    "gemma": ["q_proj", "mlp.*", "embed_tokens"],
    "gemma2": ["all-linear", "embed_tokens"],
    "gemma3_text": ["all-linear"],
    "cohere": ["all-linear"],
    "granite": ["all-linear"],
    "minicpm": ["all-linear"],
    "phi3": ["qkv_proj", "gate_up_proj"],
    "mixtral": ["q_proj", "v_proj", "block_sparse_moe.gate", "switch_mlp.*"],
    "phi3_v": ["self_attn.qkv_proj", "self_attn.o_proj", "lm_head"],
}


DORA = {
    "qwen3": ["q_proj", "k_proj", "lm_head"],
    "mixtral": ["q_proj", "v_proj", "block_sparse_moe.gate"],
    "gemma": ["q_proj", "mlp.*"],
    "gemma2": ["all-linear"],
}


def attached(directory: Path, name: str, kind: str = "lora", **options: Any) -> tuple[Any, lora_config.LoraConfig]:
    model = load_base(directory, **options)[0]
    config = configure_named(model, name, kind)
    adapter.attach(model, config, seed=0)
    fill(model)
    return model, config


def configure_named(model: Any, name: str, kind: str = "lora") -> lora_config.LoraConfig:
    targets = (DORA.get(name) if kind == "dora" else None) or TARGETS[name]
    return configure(model, type=kind, targets=targets)


def adapted(folder: Path, targets: list[str] | None = None, **options: Any) -> Any:
    """A narrowed model with a filled adapter on its layers, or on `targets`."""
    model = load_base(folder, **options)[0]
    adapter.attach(model, configure(model, targets=targets or ["all-linear"]), seed=0)
    fill(model)
    assert narrow_head(model).passed
    return model
