"""The memory that a run will need, and the memory that there is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from stages.lora import adapter, targets
from stages.lora.batches import split
from stages.lora.head import head_matrix
from stages.lora.head_product import part_length
from stages.lora.loss import chunk_length
from stages.model.kinds import LINEAR, SWITCH
from stages.tokens.row import TokenRow

# MLX allocates up to ten operations ahead of the one that it computes.
_CHUNK_COPIES = 13
# Share of a GPU's memory that buffers of earlier batches may hold. A guess, not measured: with rows of many lengths
# users of mlx-lm saw 51 GiB shrink to 7 when the buffers were let go (mlx-lm#986).
_CACHE_SHARE = 0.25
# Arrays an optimizer keeps of each weight: two at most.
_MOMENTS = 2


@dataclass(frozen=True)
class Estimate:
    """Bytes that training takes at its widest batch. `weights` is certain, the rest is a model of the peak."""

    weights: int
    adapter: int
    activations: int
    head: int
    available: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.activations + self.head


def estimate(
    model: nn.Module,
    rows: Sequence[TokenRow],
    *,
    batch_size: int | None,
    batch_tokens: int | None,
    grad_checkpoint: bool,
    fused_loss: bool,
) -> Estimate:
    """Estimate what a run needs, for a model with its adapter attached.

    Activations: each linear module's input and output in the layers that gradients pass through, and the attention
    scores; with `grad_checkpoint`, one layer's worth and each layer's input. Head: logits and their gradient in
    float32, for all trained positions of the widest batch, or with `fused_loss` for a chunk of them.
    """
    parameters = tree_flatten(model.parameters())
    trainable = adapter.weights(model)
    adapter_bytes = sum(array.nbytes for array in trainable.values())
    weights = sum(array.nbytes for _, array in parameters) - adapter_bytes
    item = max((array.itemsize for _, array in parameters if mx.issubdtype(array.dtype, mx.floating)), default=4)

    lengths = sorted((len(row.input_ids) for row in rows), reverse=True)
    length = lengths[0] if lengths else 0
    widest = split(lengths, batch_size=batch_size, batch_tokens=batch_tokens)[:1]
    tokens = length * sum(part.stop for part in widest)
    masks = sorted((int(row.loss_mask.sum()) for row in rows), reverse=True)
    parts = split(masks, batch_size=batch_size, batch_tokens=batch_tokens)
    trained = max((sum(masks[part]) for part in parts), default=0)
    vocabulary = _vocabulary(model)
    head = 3 * 4 * trained * vocabulary
    if fused_loss and head_matrix(model) is not None:
        head = min(head, 2 * 4 * part_length(trained) * trained)
    elif fused_loss and vocabulary:
        head = min(head, _CHUNK_COPIES * 4 * chunk_length(vocabulary) * vocabulary)

    first = _first_adapted_layer(model)
    layers = model.layers[first:]
    experts = int(getattr(getattr(model, "args", None), "num_experts_per_tok", 1) or 1)
    width = max((_width(layer, experts=experts) for layer in layers), default=0)
    heads = _attention_heads(model)
    one_layer = tokens * (width + 2 * heads * length) * item
    kept = one_layer * (1 if grad_checkpoint else len(layers)) + tokens * _hidden_size(model) * item * len(layers)
    return Estimate(
        weights=weights,
        adapter=adapter_bytes * (2 + _MOMENTS),
        activations=kept,
        head=head,
        available=available_memory(),
    )


def advice(needed: Estimate, *, batch_size: int | None, batch_tokens: int | None, grad_checkpoint: bool) -> str | None:
    """A line on how to make a run fit that seems not to; None if it fits.

    Raises:
        ValueError: not even the weights fit.
    """
    if needed.weights > needed.available:
        raise ValueError(
            f"the base model's weights take {_gib(needed.weights)}, this machine has {_gib(needed.available)}: "
            "choose a smaller or a quantised model (model.source)"
        )
    if needed.total <= needed.available:
        return None
    remedies = []
    if batch_tokens is not None:
        remedies.append(f"train.batch_tokens below {batch_tokens} with train.grad_accumulation above 1")
    elif batch_size is not None and batch_size > 1:
        remedies.append(f"train.batch_size below {batch_size} with train.grad_accumulation above 1")
    if not grad_checkpoint:
        remedies.append("train.grad_checkpoint: true")
    remedies += ["a smaller tokenize.max_length", "fewer lora.layers"]
    return (
        f"training may need {_gib(needed.total)} (weights {_gib(needed.weights)}, activations "
        f"{_gib(needed.activations)}, head {_gib(needed.head)}), this machine has {_gib(needed.available)}; "
        f"what helps: {', '.join(remedies)}"
    )


def available_memory() -> int:
    """Bytes that training may take: what the GPU recommends at most, or the machine's memory."""
    if mx.default_device().type == mx.DeviceType.gpu:
        info = mx.device_info()
        size = info.get("max_recommended_working_set_size") or info.get("memory_size")
        if size:
            return int(size)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cache_limit() -> int | None:
    """Bytes of buffers that MLX may keep for later batches; None on a CPU, where it keeps few."""
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    return int(_CACHE_SHARE * available_memory()) if on_gpu else None


def trim_cache(limit: int | None) -> None:
    """Let go of buffers that nothing uses, if they take more than `limit` bytes: between updates."""
    if limit is not None and mx.get_cache_memory() > limit:
        mx.clear_cache()


def _first_adapted_layer(model: nn.Module) -> int:
    """Gradients pass through this layer and all above."""
    return targets.frozen_layers(adapter.weights(model), len(model.layers))


def _width(layer: nn.Module, *, experts: int) -> int:
    """Values a token leaves behind in a layer: every linear module's input and output, in each expert it goes to."""
    width = 0
    for module in layer.modules():
        if isinstance(module, SWITCH):
            width += experts * (module.input_dims + module.output_dims)
        elif isinstance(module, LINEAR):
            rows, columns = module.weight.shape
            packed = isinstance(module, nn.QuantizedLinear)
            width += rows + (columns * 32 // module.bits if packed else columns)
    return width


def _attention_heads(model: nn.Module) -> int:
    return int(getattr(getattr(model, "args", None), "num_attention_heads", 0) or 0)


def _hidden_size(model: nn.Module) -> int:
    return int(getattr(getattr(model, "args", None), "hidden_size", 0) or 0)


def _vocabulary(model: nn.Module) -> int:
    return int(getattr(getattr(model, "args", None), "vocab_size", 0) or 0)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
