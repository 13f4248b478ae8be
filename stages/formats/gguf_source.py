"""A model directory as an exporter to GGUF sees it: architecture, mlx-lm's arguments, weights one by one."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from stages.base.manifest import check_complete
from stages.files.outputs import read_json
from stages.model import phi3
from stages.model.arrays import read_arrays
from stages.model.load import has_own_head
from stages.sources.gguf_architectures import ARCHITECTURES, Architecture

# mlx-lm computes these types with Llama's code.
_AS_LLAMA = ("llama", "mistral")
_NO_WEIGHTS = ("model.vision_embed_tokens.", "rotary_emb.inv_freq")  # what the language model does without
_WHOLE_COPY = "the folder needs a whole copy of the model"


@dataclass(frozen=True)
class Source:
    """A model directory: `args` are mlx-lm's, with its defaults, so that GGUF says what was trained."""

    directory: Path
    architecture: Architecture
    config: dict[str, Any]
    args: Any

    @property
    def head_dim(self) -> int:
        return int(getattr(self.args, "head_dim", None) or self.args.hidden_size // self.args.num_attention_heads)


def open_source(directory: Path) -> Source:
    """Read a model directory's config.

    Raises:
        ValueError: the directory is not whole, or its architecture has no proven form in GGUF here.
    """
    check_complete(directory)
    config = read_json(directory / "config.json", _WHOLE_COPY)
    if config.get("model_type") == "phi3_v":
        config = phi3.as_language_model(config)
    kind = config.get("model_type")
    architecture = next((a for a in ARCHITECTURES if kind == a.model_type), None)
    if kind in _AS_LLAMA:
        architecture = ARCHITECTURES[0]
    if architecture is None:
        raise refusal(directory, f"no form in GGUF is proven here for the architecture {kind!r}")
    code = import_module(f"mlx_lm.models.{architecture.model_type}")
    try:
        args = code.ModelArgs.from_dict(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{directory / 'config.json'}: {' '.join(str(error).split())}; {_WHOLE_COPY}") from None
    source = Source(directory, architecture, config, args)
    if problem := _unproven(source):
        raise refusal(directory, problem)
    return source


def refusal(directory: Path, problem: str) -> ValueError:
    """The error for a model that llama.cpp's own converter may know."""
    return ValueError(
        f"{directory}: {problem}; convert it with your own llama.cpp: python convert_hf_to_gguf.py {directory}"
    )


def _unproven(source: Source) -> str | None:
    """What in a config has no proven form in GGUF."""
    config, args = source.config, source.args
    if config.get("use_sliding_window"):
        return "use_sliding_window: true has no proven form"
    if source.architecture.name == "llama" and set(args.layer_types) != {"full_attention"}:
        return f"layer_types {sorted(set(args.layer_types))} has no proven form"
    if getattr(args, "rope_traditional", False):
        return "rope_traditional: true has no proven form"
    if source.architecture.name == "gemma3" and args.query_pre_attn_scalar != source.head_dim:
        return f"query_pre_attn_scalar {args.query_pre_attn_scalar:g} other than head_dim has no proven form"
    return None


class Weights:
    """The weights of a model directory by their names there; a head that is the embedding is left out.

    A tensor is read when it is asked for, and not kept.

    Raises:
        ValueError: a file is damaged.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        tied = getattr(source.args, "tie_word_embeddings", source.config.get("tie_word_embeddings", True))
        skipped: tuple[str, ...] = _NO_WEIGHTS
        if tied and not has_own_head(source.directory, source.config):
            skipped = (*skipped, "lm_head.")
        for path in sorted(source.directory.glob("model*.safetensors")):
            for name, array in read_arrays(path, _WHOLE_COPY).items():
                if not any(part in name for part in skipped):
                    self._files[name], self._shapes[name] = path, tuple(array.shape)

    def names(self) -> list[str]:
        """The tensors' names, a packed weight by that of its weight alone."""
        packed = {name.removesuffix(".scales") for name in self._files if name.endswith(".scales")}
        return [name for name in self._files if not (_is_packing(name) and name.rpartition(".")[0] in packed)]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, as if it were not packed."""
        shape = self._shapes[name]
        if not self._is_packed(name):
            return shape
        return (*shape[:-1], shape[-1] * 32 // self._packing(name)["bits"])

    def read(self, name: str) -> np.ndarray:
        """A tensor's values, float32; of a packed weight what it stands for."""
        array = self._array(name)
        if self._is_packed(name):
            module, packing = name.removesuffix(".weight"), self._packing(name)
            scales = self._array(f"{module}.scales")
            biases = self._array(f"{module}.biases").astype(mx.float32) if f"{module}.biases" in self._files else None
            if packing["mode"] == "affine":
                scales = scales.astype(mx.float32)  # else values are rounded to the type of the scales
            array = mx.dequantize(array, scales, biases, **packing)
        return np.array(array.astype(mx.float32))

    def _array(self, name: str) -> mx.array:
        return read_arrays(self._files[name], _WHOLE_COPY)[name]  # opened anew: what was read of an array stays in it

    def _is_packed(self, name: str) -> bool:
        return name.endswith(".weight") and f"{name.removesuffix('.weight')}.scales" in self._files

    def _packing(self, name: str) -> dict[str, Any]:
        """How a weight is packed: its module's own entry of the config's quantisation, or the common one."""
        config = self._source.config
        common = config.get("quantization") or config.get("quantization_config") or {}
        own = common.get(name.removesuffix(".weight"))
        found = own if isinstance(own, dict) else common
        if "bits" not in found or "group_size" not in found:
            raise ValueError(f"{self._source.directory / 'config.json'}: says not how {name} is packed; {_WHOLE_COPY}")
        return {"group_size": found["group_size"], "bits": found["bits"], "mode": found.get("mode", "affine")}


def _is_packing(name: str) -> bool:
    return name.endswith((".scales", ".biases"))
