"""PEFT folders written by hand, as PEFT's save_pretrained writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def write_peft(folder: Path, tensors: Mapping[str, np.ndarray], **config: Any) -> Path:
    """Write tensors, named without PEFT's prefix, and a config with the keys that PEFT always writes."""
    plain: dict[str, Any] = {
        "alpha_pattern": {},
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_bias": False,
        "lora_dropout": 0.1,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": {},
        "target_modules": ["q_proj"],
        "target_parameters": None,
        "use_dora": False,
        "use_rslora": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"base_model.model.{name}": array for name, array in tensors.items()}
    save_file(arrays, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(plain | config), encoding="utf-8")
    return folder


def lora_pair(module: str, *, rank: int = 4, width: int = 32, rows: int = 32, seed: int = 0) -> dict[str, np.ndarray]:
    """The two random matrices of a linear module."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rank, width)), rng.normal(size=(rows, rank))
    return {f"{module}.lora_A.weight": a.astype(np.float32), f"{module}.lora_B.weight": b.astype(np.float32)}
