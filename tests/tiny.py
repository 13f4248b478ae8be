"""Tiny models in the real layout, and small parameters, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.imports import ROOT

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


def write_llama(folder: Path, *, seed: int = 0, quantize: bool = False, dtype: str = "float32", **changes: Any) -> Path:
    """Write a random Llama and its tokenizer; `changes` go over its config."""
    import stages.lora  # noqa: F401  the BLAS comes before MLX
    import mlx.core as mx  # isort: skip
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    config = LLAMA | {"torch_dtype": dtype} | changes
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.set_dtype(getattr(mx, dtype))
    if quantize:
        nn.quantize(model, group_size=32, bits=4)
        config["quantization"] = {"group_size": 32, "bits": 4}
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_byte_tokenizer(folder)
    return folder


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
