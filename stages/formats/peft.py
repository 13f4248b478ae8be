"""Our adapter → PEFT's folder (`adapter_model.safetensors`, `adapter_config.json`).

Modules are named in full in `target_modules`, which PEFT compares whole: exactly these are adapted, in whichever
layers. mlx-lm's text models mostly keep the names of the Hub's checkpoints; where they do not, nothing is written.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from stages.adapters.heads import HEAD, head_of, is_tied
from stages.adapters.parts import Part, split
from stages.adapters.peft import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from stages.files.outputs import write_json
from stages.formats.base import Base
from stages.lora.adapter_files import Saved
from stages.lora.arrays import write_arrays
from stages.lora.targets import outside_layers
from stages.model.kinds import EMBEDDING

_COMMIT = re.compile(r"[0-9a-f]{40}")


def write(directory: Path, saved: Saved, base: Base) -> None:
    """Write the adapter as PEFT reads it.

    Raises:
        ValueError: PEFT has no exact form for a module, or the base model must be known and is not.
    """
    parts = split(saved)
    if experts := sorted(name for name, part in parts.items() if part.is_switch):
        raise ValueError(
            f"{saved.weights_path}: {experts[0]} adapts experts, for which PEFT has no exact form; merge the adapter "
            "instead (python -m stages.merge), and load the merged model"
        )
    known = base.tensor_names
    if unknown := sorted(name for name in parts if known and f"{name}.weight" not in known):
        raise ValueError(
            f"{saved.weights_path}: {unknown[0]} has another name in the base model's files, where PEFT looks; "
            "merge the adapter instead (python -m stages.merge), and load the merged model"
        )
    embeddings = _embeddings(parts, saved, base)
    tensors: dict[str, mx.array] = {}
    for name, part in parts.items():
        tensors |= _tensors(name, part, is_embedding=name in embeddings)
    if embeddings and base.model is not None and is_tied(base.model):
        tensors |= _tensors(HEAD, head_of(parts[min(embeddings)]), is_embedding=False)
        parts[HEAD] = parts[min(embeddings)]
    directory.mkdir(parents=True, exist_ok=True)
    write_arrays(directory / WEIGHTS_FILE, tensors, framework="pt")
    write_json(directory / CONFIG_FILE, _config(saved, base, modules=sorted(parts)))


def _embeddings(parts: dict[str, Part], saved: Saved, base: Base) -> set[str]:
    """The embeddings among the modules; without the base model, by the name that they have on the Hub."""
    if base.model is not None:
        modules = outside_layers(base.model)
        return {name for name in parts if isinstance(modules.get(name), EMBEDDING)}
    if named := [name for name in parts if "embed" in name.rpartition(".")[2]]:
        raise ValueError(
            f"{saved.weights_path}: adapts {named[0]}, and only the base model says whether its head is the same "
            "matrix; run: python -m stages.fetch, and name its manifest with --manifest"
        )
    return set()


def _tensors(name: str, part: Part, *, is_embedding: bool) -> dict[str, mx.array]:
    kinds = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    arrays = dict(zip(kinds, (mx.contiguous(part.a.T), mx.contiguous(part.b.T)), strict=True))
    if part.m is not None:
        arrays["lora_magnitude_vector"] = part.m
    return {f"{PREFIX}{name}.{kind}": array.astype(mx.float32) for kind, array in arrays.items()}


def _config(saved: Saved, base: Base, *, modules: list[str]) -> dict[str, Any]:
    config = saved.config
    alpha = _alpha(config.scale, config.rank)
    revision = base.manifest.revision if base.manifest and base.hub_id else ""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.hub_id,
        "revision": revision if _COMMIT.fullmatch(revision) else None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.dropout,
        "use_rslora": False,
        "use_dora": config.type == "dora",
        "target_modules": modules,
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _alpha(scale: float, rank: int) -> float:
    """The number that divided by the rank is the scale: to the last bit, if the scale was made so."""
    alpha = scale * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, 0))
    return next((number for number in near if number / rank == scale), alpha)
