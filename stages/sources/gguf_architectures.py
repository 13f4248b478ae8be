"""How each architecture of language models lies in GGUF: names of tensors, order of rows, and what norms hold.

Source: llama.cpp's tensor names (gguf-py, `constants.py` and `tensor_mapping.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

_ATTENTION = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
_OUTPUT = {"self_attn.o_proj": "attn_output"}
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_LLAMA = _ATTENTION | _OUTPUT | _MLP | _NORMS
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.([\w.]+)")
_IN_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)")


@dataclass(frozen=True)
class Architecture:
    """One architecture: `general.architecture` of GGUF, and `model_type` and class of Hugging Face.

    `modules` are those of a layer, by their names in Hugging Face's layout and in GGUF. `biased` of them have a bias.
    `permuted`: the rows of q and k lie in another order. `norm_shift` is added to the weights of all norms.
    """

    name: str
    model_type: str
    hf_class: str
    modules: Mapping[str, str]
    biased: frozenset[str] = field(default=frozenset())
    permuted: bool = False
    norm_shift: int = 0

    @cached_property
    def _hf_modules(self) -> dict[str, str]:
        return {gguf: hf for hf, gguf in self.modules.items()}

    def gguf_module(self, module: str) -> str | None:
        """`model.layers.3.self_attn.q_proj` → `blk.3.attn_q`; None if the architecture has no such module."""
        if module in _TOP:
            return _TOP[module]
        match = _IN_LAYER.fullmatch(module)
        return f"blk.{match[1]}.{self.modules[match[2]]}" if match and match[2] in self.modules else None

    def hf_module(self, module: str) -> str | None:
        """`blk.3.attn_q` → `model.layers.3.self_attn.q_proj`; None if the architecture has no such module."""
        for hf, gguf in _TOP.items():
            if gguf == module:
                return hf
        match = _IN_BLOCK.fullmatch(module)
        return (
            f"model.layers.{match[1]}.{self._hf_modules[match[2]]}" if match and match[2] in self._hf_modules else None
        )

    def has(self, module: str, kind: str) -> bool:
        """True if a module, by its Hugging Face name, has a tensor of this kind: `weight`, or `bias` where it may."""
        return kind == "weight" or (kind == "bias" and module.split(".", 3)[-1] in self.biased)

    def permuted_heads(self, module: str, *, heads: int, kv_heads: int) -> int | None:
        """The number of heads whose rows lie in another order in GGUF; None for a module that lies as it is."""
        if not self.permuted:
            return None
        return {"q_proj": heads, "k_proj": kv_heads}.get(module.rpartition(".")[2])


LLAMA = Architecture(
    "llama", "llama", "LlamaForCausalLM", _LLAMA, biased=frozenset(_ATTENTION | _OUTPUT), permuted=True
)
ARCHITECTURES = (
    LLAMA,
    Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", _LLAMA, biased=frozenset(_ATTENTION)),
    Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", _LLAMA | _HEAD_NORMS),
    Architecture(
        "phi3",
        "phi3",
        "Phi3ForCausalLM",
        {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
        | _OUTPUT
        | _NORMS,
    ),
    Architecture(
        "gemma3",
        "gemma3_text",
        "Gemma3ForCausalLM",
        _ATTENTION
        | _OUTPUT
        | _MLP
        | _HEAD_NORMS
        | {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        },
        norm_shift=1,
    ),
)


def permute(rows: np.ndarray, *, heads: int) -> np.ndarray:
    """Interleave the two rotary halves of each head's rows, shape (heads · head_dim, …), as llama.cpp wants them."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)


def unpermute(rows: np.ndarray, *, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of each head's rotary halves, shape (heads · head_dim, …).

    It moves whole rows, and quantisation runs along a row, so packed weights, scales and biases move alike.
    """
    head_dim = rows.shape[0] // heads
    return rows.reshape(heads, head_dim // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
