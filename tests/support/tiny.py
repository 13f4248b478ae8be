"""Tiny models in the real layout, and small parameters, for tests."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.support.imports import ROOT

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "vocab_size": 258,
    "tie_word_embeddings": True,
    "eos_token_id": 257,
    "torch_dtype": "float32",
}


_SIZES = {key: value for key, value in LLAMA.items() if key not in ("model_type", "architectures")}
_PHI3 = _SIZES | {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "tie_word_embeddings": False,
    "original_max_position_embeddings": 512,
    "rope_scaling": None,
    "sliding_window": 2047,
}
# Keys as in each model's config.json on the Hub, sizes apart.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": _SIZES | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
    "qwen3": _SIZES
    | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "tie_word_embeddings": False},
    "gemma": _SIZES | {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "head_dim": 16},
    "gemma2": _SIZES
    | {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": _SIZES
    | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "query_pre_attn_scalar": 8,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
    },
    "cohere": _SIZES | {"model_type": "cohere", "architectures": ["CohereForCausalLM"], "logit_scale": 0.25},
    "granite": _SIZES
    | {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "attention_bias": False,
        "attention_multiplier": 0.35,
        "embedding_multiplier": 2.0,
        "logits_scaling": 4.0,
        "mlp_bias": False,
        "residual_multiplier": 0.5,
    },
    "minicpm": _SIZES
    | {
        "model_type": "minicpm",
        "architectures": ["MiniCPMForCausalLM"],
        "dim_model_base": 8,
        "scale_depth": 1.4,
        "scale_emb": 2.0,
        "tie_word_embeddings": False,
    },
    "phi3": _PHI3,
    "mixtral": _SIZES
    | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "phi3_v": _PHI3
    | {
        "architectures": ["Phi3VForCausalLM"],
        "model_type": "phi3_v",
        "auto_map": {
            "AutoConfig": "configuration_phi3_v.Phi3VConfig",
            "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
        },
        "embd_layer": {"embedding_cls": "image", "projection_cls": "mlp", "use_hd_transform": True},
        "img_processor": {"name": "clip_vision_model", "image_dim_out": 1024, "num_img_tokens": 144},
        "original_max_position_embeddings": 32,
        "rope_scaling": {
            "type": "su",
            "short_factor": [1.05, 1.1, 1.3, 1.8],
            "long_factor": [1.03, 1.5, 12.0, 48.0],
        },
    },
}


def write_llama(folder: Path, *, seed: int = 0, quantize: bool = False, dtype: str = "float32", **changes: Any) -> Path:
    """Write a random Llama and its tokenizer; `changes` go over its config."""
    return write_model(folder, "llama", seed=seed, quantize=quantize, dtype=dtype, **changes)


def write_model(
    folder: Path,
    architecture: str,
    *,
    seed: int = 0,
    quantize: bool = False,
    bits: int = 4,
    dtype: str = "float32",
    **changes: Any,
) -> Path:
    """Write a random model of CONFIGS and its tokenizer, weights named as on the Hub; `changes` go over its config."""
    import stages.model  # noqa: F401  the BLAS comes before MLX
    import mlx.core as mx  # isort: skip
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    config = CONFIGS[architecture] | {"torch_dtype": dtype} | changes
    code = import_module(f"mlx_lm.models.{'phi3' if architecture == 'phi3_v' else architecture}")
    mx.random.seed(seed)
    model = code.Model(code.ModelArgs.from_dict(config))
    if architecture == "gemma3_text":
        model.pop("lm_head")  # tied, as the weights on the Hub have it
    model.set_dtype(getattr(mx, dtype))
    if quantize:
        nn.quantize(model, group_size=32, bits=bits)
        config["quantization"] = {"group_size": 32, "bits": bits}
    weights = dict(tree_flatten(model.parameters()))
    if architecture == "mixtral" and not quantize:
        weights = _unstacked(weights)
    if architecture == "phi3_v":
        weights["model.vision_embed_tokens.glb_GN"] = mx.zeros((1, 1, 8))
        weights["model.vision_embed_tokens.img_projection.0.weight"] = mx.ones((8, 8))
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_byte_tokenizer(folder)
    return folder


def _unstacked(weights: dict[str, Any]) -> dict[str, Any]:
    """Mixtral's experts one by one, as on the Hub."""
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    apart = {}
    for name, array in weights.items():
        block, switch, rest = name.partition("switch_mlp.")
        if not switch:
            apart[name] = array
            continue
        projection = names[rest.removesuffix(".weight")]
        apart |= {f"{block}experts.{i}.{projection}.weight": expert for i, expert in enumerate(array)}
    return apart


def write_byte_tokenizer(folder: Path) -> None:
    """A tokenizer with one token a byte, `<|pad|>` and `<|end|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|pad|>", "<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")


def small_params(**model: Any) -> str:
    """The project's params.yaml with a few quick updates; keyword arguments go into `model`."""
    import io

    yaml = YAML()
    params = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["model"].update(model)
    params["prepare"].update(valid_fraction=0.2, test_fraction=0.2)
    params["lora"].update(layers=2, rank=4, alpha=8)
    params["train"].update(epochs=None, iters=6, batch_size=4, steps_per_eval=3, steps_per_report=2, keep="last")
    params["generate"].update(max_tokens=8)
    stream = io.StringIO()
    yaml.dump(params, stream)
    return stream.getvalue()
