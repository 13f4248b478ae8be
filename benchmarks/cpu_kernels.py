"""The gain of the CPU kernels: each beside MLX's own, then a whole training step, and its matmuls alone.

`python -m benchmarks.cpu_kernels [--rows 4] [--tokens 100] [--trained 50] [--repeats 9]`: the default base with LoRA on
q_proj and v_proj of the last 8 layers. The layers before these are left out, as they are with their output cached. The
variants take turns; medians, and the range. The matmuls alone are those of linear layers and head, forward and back.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages.base.manifest import locate, read_manifest
from stages.cli import console
from stages.model import blas

if TYPE_CHECKING:
    from stages.tokens.row import TokenRow

LAYERS = 8


def cpu_kernels(
    rows: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each row.")] = 100,
    trained: Annotated[int, typer.Option(min=1, help="Trained tokens of each row.")] = 50,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds.")] = 9,
    base: Annotated[Path, typer.Option(help="The base model's manifest.")] = Path("artifacts/base.json"),
) -> None:
    """Time each kernel and a training step with and without the kernels."""
    blas.preload()
    directory = locate(read_manifest(base))
    _kernels(repeats)
    _step(directory, _rows(rows, tokens, trained), repeats)


def _kernels(repeats: int) -> None:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models import activations

    from stages.lora import kernels

    wide, narrow = mx.random.normal((400, 1536)), mx.random.normal((400, 576))
    heads = mx.random.normal((4, 9, 100, 64))
    logits, targets = mx.random.normal((300, 49_152)), mx.arange(300)
    mx.eval(wide, narrow, heads, logits)
    turns: dict[str, Any] = {"traditional": False, "base": 1e5, "scale": 1.0, "offset": 0}
    variants: dict[str, tuple[mx.array, Callable[[Any], Any], Callable[[Any], Any]]] = {
        "SwiGLU": (wide, lambda x: activations.swiglu(x, x), lambda x: kernels.swiglu(x, x)),
        "GELU (tanh)": (wide, nn.gelu_approx, kernels.gelu_approx),
        "softmax": (wide, lambda x: mx.softmax(x, axis=-1), lambda x: kernels.softmax(x, axis=-1)),
        "RMSNorm": (
            narrow,
            lambda x: mx.fast.rms_norm(x, x[0], 1e-5),
            lambda x: kernels.rms_norm(x, x[0], 1e-5),
        ),
        "RoPE": (heads, lambda x: mx.fast.rope(x, 64, **turns), lambda x: kernels.rope(x, 64, **turns)),
        "attention": (
            heads,
            lambda x: mx.fast.scaled_dot_product_attention(x, x[:, :3], x[:, 3:6], scale=0.1, mask="causal"),
            lambda x: kernels.fast_attention(x, x[:, :3], x[:, 3:6], scale=0.1, mask="causal"),
        ),
    }
    lines = []
    for title, (x, plain, fast) in variants.items():
        both: dict[str, Callable[[], Any]] = {}
        for name, function in (("plain", plain), ("fast", fast)):
            both[f"{name} value"] = partial(function, x)
            both[f"{name} both"] = partial(mx.vjp, function, [x], [x])
        lines.append((title, *_nanoseconds(_in_turn(both, repeats), x.size)))
    times = _in_turn(
        {
            "plain value": lambda: nn.losses.cross_entropy(logits, targets),
            "plain both": lambda: mx.value_and_grad(lambda x: nn.losses.cross_entropy(x, targets).sum())(logits),
            "fast value": lambda: kernels.cross_entropy(logits, targets),
            "fast both": lambda: kernels.cross_entropy_with_gradient(logits, targets),
        },
        repeats,
    )
    lines.append(("cross-entropy", *_nanoseconds(times, logits.size)))
    console.table(
        "Nanoseconds a number (value; value and gradient)", ("", "MLX", "MLX, both", "fast", "fast, both"), lines
    )


def _nanoseconds(times: dict[str, list[float]], count: int) -> list[str]:
    return [f"{statistics.median(spent) / count * 1e9:.2f}" for spent in times.values()]


def _step(directory: Path, rows: list[TokenRow], repeats: int) -> None:
    import mlx.core as mx
    import mlx.nn as nn

    from stages.lora.batches import collate
    from stages.lora.execution import narrow_head, use_kernels
    from stages.lora.loss import fused_sum_loss, sum_loss

    batch = collate(rows)
    plain, fast = _last_layers(directory), _last_layers(directory)
    if reason := use_kernels(fast, rows).note:
        console.warn(reason)
    for model in (plain, fast):
        narrow_head(model)
    steps = {
        "MLX": (plain, sum_loss),
        "MLX, fused loss": (plain, fused_sum_loss),
        "kernels": (fast, sum_loss),
        "kernels, fused loss": (fast, fused_sum_loss),
    }
    variants: dict[str, Callable[[], Any]] = {
        name: partial(nn.value_and_grad(model, loss), model, batch) for name, (model, loss) in steps.items()
    }
    tokens, trained = batch.inputs_BxL.size, batch.trained_tokens
    products = _products(plain, tokens=tokens, trained=trained)
    variants["the matmuls alone"] = partial(_multiply, products)
    peaks = {}
    for name, variant in variants.items():
        mx.reset_peak_memory()
        mx.eval(variant())
        peaks[name] = mx.get_peak_memory()
    times = _in_turn(variants, repeats)
    limit = statistics.median(times["the matmuls alone"])
    lines = [
        (
            name,
            f"{statistics.median(spent) * 1e3:.0f}",
            f"{min(spent) * 1e3:.0f} to {max(spent) * 1e3:.0f}",
            f"{tokens / statistics.median(spent):.0f}",
            f"{limit / statistics.median(spent):.0%}",
            f"{peaks[name] / 1e6:.0f}",
        )
        for name, spent in times.items()
    ]
    flops = sum(2 * x.size * w.shape[1] for x, w in products)
    title = f"A step of {len(rows)} × {tokens // len(rows)} tokens, {trained // len(rows)} of each trained; "
    title += f"matmuls {flops / 1e9:.1f} GFLOP at {flops / limit / 1e9:.0f} GFLOP/s"
    console.table(title, ("", "ms", "range", "tokens/s", "of the limit", "peak MB"), lines)


def _last_layers(directory: Path) -> Any:
    from stages.lora import adapter
    from stages.lora.lora_config import LoraConfig
    from stages.model.load import load_base

    model: Any = load_base(directory, dtype="float32")[0]
    keys = ("self_attn.q_proj", "self_attn.v_proj")
    adapter.attach(model, LoraConfig(8, 2.0, 0.0, keys, LAYERS, "lora"), seed=0)
    model.model.layers = model.model.layers[-LAYERS:]
    return model


def _rows(rows: int, tokens: int, trained: int) -> list[TokenRow]:
    import numpy as np

    from stages.tokens.row import TokenRow

    mask = np.zeros(tokens + 1, dtype=bool)
    mask[-trained:] = True
    ids = np.random.default_rng(0).integers(0, 40_000, (rows, tokens + 1)).astype(np.int32)
    return [TokenRow(str(i), "random", row, mask, trained, False) for i, row in enumerate(ids)]


def _products(model: Any, *, tokens: int, trained: int) -> list[tuple[Any, Any]]:
    """Operands of each linear layer's product forward and of that backward, and of the head's."""
    import mlx.core as mx
    import mlx.nn as nn

    weights = [(m.weight, tokens) for layer in model.layers for m in layer.modules() if isinstance(m, nn.Linear)]
    weights.append((model.model.embed_tokens.weight, trained))
    products = []
    for weight, rows in weights:
        products += [
            (mx.random.normal((rows, weight.shape[1])), weight.T),
            (mx.random.normal((rows, weight.shape[0])), weight),
        ]
    mx.eval([x for x, _ in products])
    return products


def _multiply(products: list[tuple[Any, Any]]) -> list[Any]:
    import mlx.core as mx

    for x, weight in products:
        mx.eval(x @ weight)
    return []


def _in_turn(variants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each variant by name. They take turns in each round, so that whatever else runs slows all of them."""
    import mlx.core as mx

    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            started = time.perf_counter()
            mx.eval(variant())
            times[name].append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    console.main(cpu_kernels)
