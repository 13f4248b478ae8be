"""The embedding and its head: whether they are one matrix, and what an adapter on that matrix is elsewhere.

An adapter on the embedding of a tied model changes the head too: mlx-lm's `LoRAEmbedding` applies it in both places.
PEFT adapts modules, so that the head of a tied model keeps the plain embedding unless it has an adapter of its own. The
update of the head is that of the embedding with A and B transposed and exchanged: x (A B)ᵀ = x Bᵀ Aᵀ.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from stages.adapters.parts import Part
from stages.lora.targets import outside_layers
from stages.model.kinds import EMBEDDING, LINEAR

HEAD = "lm_head"


def is_tied(model: nn.Module) -> bool:
    """True if no linear module outside of the layers has as many rows as the embedding: the embedding is the head."""
    modules = outside_layers(model).values()
    rows = {module.weight.shape[0] for module in modules if isinstance(module, EMBEDDING)}
    return not any(isinstance(module, LINEAR) and module.weight.shape[0] in rows for module in modules)


def head_of(embedding: Part) -> Part:
    """The update of the head that an update of the embedding is."""
    return Part(mx.contiguous(embedding.b.T), mx.contiguous(embedding.a.T), embedding.scale)


def tied_head(parts: dict[str, Part], embeddings: set[str], *, model: nn.Module | None, path: Path) -> bool:
    """Whether `lm_head` among the parts is the adapted embedding of a tied model, to be left out.

    Raises:
        ValueError: the base model is not known, or the head of a tied model has another update than its embedding.
    """
    if not embeddings:
        if HEAD in parts and model is not None and is_tied(model):
            raise ValueError(_apart(path, HEAD, "embedding"))
        return False
    if model is None:
        raise ValueError(
            f"{path}: adapts {min(embeddings)}, and only the base model says whether its head is the same matrix; "
            "run: python -m stages.fetch, and name its manifest with --manifest"
        )
    if not is_tied(model):
        return False
    head, same = parts.get(HEAD), head_of(parts[min(embeddings)])
    if head is not None and head.scale == same.scale and _equal(head.a, same.a) and _equal(head.b, same.b):
        return True
    raise ValueError(_apart(path, min(embeddings), "head"))


def _apart(path: Path, module: str, other: str) -> str:
    return (
        f"{path}: adapts {module} and not its {other} with it, which are one matrix in the base model; here they have "
        "one update: merge the adapter with PEFT (merge_and_unload) and take the result as the base model"
    )


def _equal(one: mx.array, other: mx.array) -> bool:
    return one.shape == other.shape and bool(mx.array_equal(one, other))
