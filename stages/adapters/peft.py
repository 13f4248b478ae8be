"""PEFT's folder (`adapter_model.safetensors`, `adapter_config.json`) → our adapter.

A linear module has `lora_A.weight` (rank, in) and `lora_B.weight` (out, rank), with DoRA `lora_magnitude_vector` (out),
an embedding `lora_embedding_A` (rank, rows) and `lora_embedding_B` (width, rank): ours, transposed. Its factor is
alpha / rank, or alpha / √rank with `use_rslora`, by module where `rank_pattern` and `alpha_pattern` say so. Which
modules and layers there are, the tensors say. `fan_in_fan_out` tells how the base's weight lies, and changes neither
the two matrices nor the magnitudes. Source: PEFT's `LoraConfig` and `tuners/lora/layer.py`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from stages.adapters.heads import HEAD, tied_head
from stages.adapters.parts import Part, check, join
from stages.files.outputs import read_json
from stages.lora.adapter_files import Saved
from stages.model.arrays import read_arrays

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_HINT = "save it anew with PEFT's save_pretrained"
_MERGE = "merge it with PEFT (merge_and_unload) and take the result as the base model"
# What says where the adapter is and how it was trained: the tensors tell the first, the second changes nothing now.
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
# These leave the base's weights as they are; the others (pissa, olora, corda, loftq, …) subtract the first A B of them.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_NEAR = 0.2  # of the norm: rounding to 4 bits moves weights by half of that, other weights are 1.4 away
_KINDS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}


def read(directory: Path, *, model: nn.Module | None = None) -> Saved:
    """Read PEFT's folder; `model` is the base model, which adapters on the embedding need.

    Raises:
        ValueError: files are missing or damaged, or the adapter does what ours has no exact form for, by name.
    """
    config_path, path = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    config = _read_config(config_path)
    matrices, embeddings, copies = _sorted(_read_tensors(path), path)
    known = {name for name, _ in model.named_modules()} if model is not None else set()
    parts = {}
    for name, found in sorted(matrices.items()):
        if name in embeddings and "m" in found:
            raise ValueError(f"{path}: {name}: DoRA on an embedding has no form here; {_MERGE}")
        parts[_our_name(name, known)] = _part(name, found, config, directory)
    _check_copies(copies, model=model, path=path)
    if tied_head(parts, embeddings, model=model, path=path):
        del parts[HEAD]
    layers = len(model.layers) if model is not None else None
    return join(parts, dropout=config["lora_dropout"], layers=layers, config_path=config_path, weights_path=path)


def _part(name: str, found: dict[str, mx.array], config: dict[str, Any], directory: Path) -> Part:
    """A module's matrices as ours."""
    path = directory / WEIGHTS_FILE
    if found.keys() != ({"a", "b", "m"} if config.get("use_dora") else {"a", "b"}):
        raise ValueError(f"{path}: {name} has {', '.join(sorted(found))} of the matrices a, b, m alone; {_HINT}")
    if found["a"].ndim != 2 or found["b"].ndim != 2:
        raise ValueError(f"{path}: {name} is no linear module or embedding: A {found['a'].shape}; {_MERGE}")
    rank, scale = _shape(name, config, directory / CONFIG_FILE)
    part = Part(found["a"].T, found["b"].T, scale, found.get("m"))
    check(part, name, path)
    if part.rank != rank:
        raise ValueError(f"{path}: {name} has rank {part.rank}, {CONFIG_FILE} says {rank}; {_HINT}")
    return part


def _our_name(name: str, known: set[str]) -> str:
    """The module's name on the Hub and here: transformers 5 calls Mixtral's `block_sparse_moe` `mlp`."""
    earlier = name.replace(".mlp.", ".block_sparse_moe.")
    return earlier if earlier in known and name not in known else name


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path, _HINT)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}, 'LORA' is read; {_MERGE}")
    refused = [key for key, value in config.items() if value and key not in _HARMLESS]
    if config.get("target_parameters") == ["gate.weight"]:
        refused.remove("target_parameters")  # of a gate, a matrix as any other; of experts, stacked ones
    if config.get("bias", "none") != "none":
        refused.append("bias")
    if config.get("init_lora_weights", True) not in _INITS:
        refused.append("init_lora_weights")  # the adapter belongs to a base of other weights
    if refused:
        shown = ", ".join(f"{' '.join(key.split())} ({config[key]!r:.40})" for key in sorted(refused))
        raise ValueError(f"{path}: {shown} has no exact form here; {_MERGE}")
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float):
        raise ValueError(f"{path}: lora_dropout is {dropout!r}, no number; {_HINT}")
    return config | {"lora_dropout": float(dropout)}


def _read_tensors(path: Path) -> dict[str, mx.array]:
    if not path.exists() and path.with_suffix(".bin").exists():
        raise ValueError(f"{path.with_suffix('.bin')}: pickled, which may run code when read; {_HINT} (safetensors)")
    tensors = read_arrays(path, _HINT)
    if not tensors:
        raise ValueError(f"{path}: empty; {_HINT}")
    return tensors


def _sorted(
    tensors: dict[str, mx.array], path: Path
) -> tuple[dict[str, dict[str, mx.array]], set[str], dict[str, mx.array]]:
    """Matrices by module and kind, the embeddings among the modules, and copies of the base's weights."""
    matrices: dict[str, dict[str, mx.array]] = {}
    embeddings: set[str] = set()
    copies: dict[str, mx.array] = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(PREFIX)
        suffix = next((kind for kind in _KINDS if inner.endswith(f".{kind}")), None)
        if inner == name or (suffix is None and not inner.endswith(".base_layer.weight")):
            raise ValueError(f"{path}: {name} is no LoRA matrix, and has no exact form here; {_MERGE}")
        if suffix is None:
            copies[inner.removesuffix(".base_layer.weight")] = tensor
            continue
        module = inner.removesuffix(f".{suffix}")
        matrices.setdefault(module, {})[_KINDS[suffix]] = tensor.astype(mx.float32)
        if suffix.startswith("lora_embedding"):
            embeddings.add(module)
    return matrices, embeddings, copies


def _shape(name: str, config: dict[str, Any], path: Path) -> tuple[int, float]:
    """A module's rank and the factor on its update."""
    try:
        rank = _by_pattern(name, config.get("rank_pattern"), config["r"])
        alpha = _by_pattern(name, config.get("alpha_pattern"), config["lora_alpha"])
        return int(rank), alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError, re.error) as error:
        raise ValueError(f"{path}: not a LoRA config ({type(error).__name__}: {error}); {_HINT}") from None


def _by_pattern(name: str, patterns: dict[str, float] | None, otherwise: float) -> float:
    """The value of the first pattern that the end of the name matches, as PEFT's `get_pattern_key` finds it."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, otherwise)


def _check_copies(copies: dict[str, mx.array], *, model: nn.Module | None, path: Path) -> None:
    """PEFT saves the weights under an adapted embedding and head too: they must be the base's own.

    Halves and a base that was quantised round them.
    """
    modules = dict(model.named_modules()) if model is not None else {}
    for name, tensor in copies.items():
        module = modules.get(name)
        if module is None or "scales" in module:
            continue  # there is nothing to compare with
        weight, copy = module.weight.astype(mx.float32), tensor.astype(mx.float32)
        is_near = weight.shape == copy.shape and mx.linalg.norm(weight - copy) <= _NEAR * mx.linalg.norm(copy)
        if not is_near:
            raise ValueError(f"{path}: its {name} differs from the base model's; is it another base? If not, {_MERGE}")
