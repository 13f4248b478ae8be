"""A base model's folder → an MLX model in the float type that suits the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model, load_model

from stages.files.outputs import read_json
from stages.model import phi3
from stages.model.arrays import read_arrays
from stages.model.kinds import SWITCH

_WHOLE_COPY = "the folder needs a whole copy of the model"
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def on_cpu() -> bool:
    """True where MLX computes on the CPU."""
    return mx.default_device().type == mx.DeviceType.cpu


def load_base(
    directory: Path,
    *,
    dtype: str = "auto",
    dequantize: bool | None = None,
    keep_dtype: bool = False,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """The frozen model in evaluation mode, and its config; of a Phi-3-Vision checkpoint the language model alone.

    Weights are read, and dequantised, when they are first computed with: a layer that never runs takes no memory.
    `dtype` "auto" is float32 on a CPU, where halves are slow, and the model's own elsewhere or with `keep_dtype`.
    `dequantize` None means on a CPU, where quantised matrix products are slow, and not elsewhere.

    Raises:
        ValueError: mlx-lm does not know the architecture, weights and config do not fit, or the device lacks the type.
    """
    model, config = _open(directory, trust_remote_code=trust_remote_code)
    target = DTYPES.get(dtype)
    if target is None:
        target = mx.float32 if on_cpu() and not keep_dtype else floating_dtype(model)
    if on_cpu() and not keep_dtype and target != mx.float32 and has_experts(model):
        raise ValueError("model.dtype: MLX computes experts on a CPU in float32 alone; set it to auto or float32")
    if on_cpu() if dequantize is None else dequantize:
        model = dequantized(model)
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    model.set_dtype(target)
    model.freeze()
    model.eval()
    return model, config


def require_merged(directory: Path) -> Path:
    """The folder itself, if merge wrote a model there.

    Raises:
        ValueError: there is none.
    """
    if not (directory / "config.json").exists():
        raise ValueError(f"{directory}: no merged model; make it with: python -m stages.merge")
    return directory


def _open(directory: Path, *, trust_remote_code: bool) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's model and config, weights not read yet."""
    config = read_json(directory / "config.json", _WHOLE_COPY)
    changes = untied(config) if has_own_head(directory, config) else None
    try:
        if config.get("model_type") != "phi3_v":
            model, config = load_model(directory, lazy=True, model_config=changes, trust_remote_code=trust_remote_code)
        else:
            model, config = load_model(
                directory, lazy=True, model_config=changes, get_model_classes=phi3.language_model_classes
            )
            config = phi3.as_language_model(config)
    except (ValueError, TypeError) as error:  # TypeError: a key that the architecture needs is not in the config
        raise ValueError(f"{directory}: {' '.join(str(error).split())}") from None
    phi3.restore_short_factors(model)
    return model, config


def has_own_head(directory: Path, config: dict[str, Any]) -> bool:
    """True if the weights hold a head that differs from the embedding although the config does not say so.

    It is loaded as it is then, as transformers does (`PreTrainedModel.tie_weights`); mlx-lm would drop it.

    Raises:
        ValueError: the config says that there is a head apart, and the weights hold none.
    """
    weights: dict[str, mx.array] = {}
    for path in sorted(directory.glob("model*.safetensors")):
        weights |= read_arrays(path, _WHOLE_COPY)
    head, embedding = _parts(weights, "lm_head"), _parts(weights, "embed_tokens")
    if not embedding:
        return False
    if not head:
        rows = embedding["weight"].shape[0]
        as_long = [name for name, array in weights.items() if name.endswith("weight") and array.shape[:1] == (rows,)]
        if _tied(config) is False and len(as_long) == 1:
            raise ValueError(
                f"{directory}: config.json says tie_word_embeddings: false, but the weights hold no lm_head; "
                "set it to true if the head is the embedding, or take a whole checkpoint"
            )
        return False
    if _tied(config) is False:
        return False  # loaded as it is without a change; comparing would read both
    return head.keys() != embedding.keys() or not all(
        head[kind].shape == embedding[kind].shape and bool(mx.array_equal(head[kind], embedding[kind])) for kind in head
    )


def _parts(weights: dict[str, mx.array], module: str) -> dict[str, mx.array]:
    """A module's arrays by kind: `weight`, and of a quantised one `scales` and `biases`."""
    split = {name: name.rsplit(".", 2) for name in weights}
    return {parts[-1]: weights[name] for name, parts in split.items() if parts[-2:-1] == [module]}


def _tied(config: dict[str, Any]) -> bool | None:
    """`tie_word_embeddings` of a config, if it is there."""
    return (config.get("text_config") or config).get("tie_word_embeddings", config.get("tie_word_embeddings"))


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """The changes to a config that make the head another matrix than the embedding."""
    changes: dict[str, Any] = {"tie_word_embeddings": False}
    if text := config.get("text_config"):
        changes["text_config"] = text | changes
    return changes


def has_experts(model: nn.Module) -> bool:
    """True for a mixture of experts."""
    return any(isinstance(module, SWITCH) for module in model.modules())


def dequantized(model: nn.Module) -> nn.Module:
    """The model with plain weights in float32, for dequantising rounds to the type of the scales."""
    model.set_dtype(mx.float32)
    return dequantize_model(model)


def floating_dtype(model: nn.Module) -> mx.Dtype:
    """The type of most of the model's floating-point weights."""
    sizes: dict[mx.Dtype, int] = {}
    for _, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            sizes[array.dtype] = sizes.get(array.dtype, 0) + array.size
    return max(sizes, key=lambda kind: sizes[kind])
