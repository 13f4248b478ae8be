"""What the CPU kernels gain: each beside MLX's own, then a whole training step, and how near that is to its matmuls.

`python -m benchmarks.cpu_kernels [--rows 4] [--tokens 100] [--trained 50] [--repeats 9]`: the default base with LoRA on
q_proj and v_proj of the last 8 layers. The layers before these are left out, as they are with their output cached. The
ways take turns; medians, and the range. The matmuls alone are those of linear layers and head, forward and back.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stages.base.manifest import locate, read_manifest
from stages.cli import console

LAYERS = 8


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", type=int, default=4)
    arguments.add_argument("--tokens", type=int, default=100, help="of a row")
    arguments.add_argument("--trained", type=int, default=50, help="of them")
    arguments.add_argument("--repeats", type=int, default=9)
    arguments.add_argument("--base", type=Path, default=Path("artifacts/base.json"))
    given = arguments.parse_args()
    directory = locate(read_manifest(given.base))
    _kernels(given.repeats)
    _step(directory, given)


def _kernels(repeats: int) -> None:
    import stages.lora.kernels as cpu
    import mlx.core as mx  # isort: skip
    import mlx.nn as nn
    from mlx_lm.models import activations

    wide, narrow = mx.random.normal((400, 1536)), mx.random.normal((400, 576))
    heads = mx.random.normal((4, 9, 100, 64))
    logits, targets = mx.random.normal((300, 49_152)), mx.arange(300)
    mx.eval(wide, narrow, heads, logits)
    turns: dict[str, Any] = {"traditional": False, "base": 1e5, "scale": 1.0, "offset": 0}
    ways: dict[str, tuple[mx.array, Callable[[Any], Any], Callable[[Any], Any]]] = {
        "SwiGLU": (wide, lambda x: activations.swiglu(x, x), lambda x: cpu.swiglu(x, x)),
        "GELU (tanh)": (wide, nn.gelu_approx, cpu.gelu_approx),
        "softmax": (wide, lambda x: mx.softmax(x, axis=-1), lambda x: cpu.softmax(x, axis=-1)),
        "RMSNorm": (
            narrow,
            lambda x: mx.fast.rms_norm(x, x[0], 1e-5),
            lambda x: cpu.rms_norm(x, x[0], 1e-5),
        ),
        "RoPE": (heads, lambda x: mx.fast.rope(x, 64, **turns), lambda x: cpu.rope(x, 64, **turns)),
        "attention": (
            heads,
            lambda x: mx.fast.scaled_dot_product_attention(x, x[:, :3], x[:, 3:6], scale=0.1, mask="causal"),
            lambda x: cpu.fast_attention(x, x[:, :3], x[:, 3:6], scale=0.1, mask="causal"),
        ),
    }
    lines = []
    for title, (x, plain, fast) in ways.items():
        both: dict[str, Callable[[], Any]] = {}
        for name, function in (("plain", plain), ("fast", fast)):
            both[f"{name} value"] = partial(function, x)
            both[f"{name} both"] = partial(mx.vjp, function, [x], [x])
        lines.append((title, *_nanoseconds(_in_turn(both, repeats), x.size)))
    times = _in_turn(
        {
            "plain value": lambda: nn.losses.cross_entropy(logits, targets),
            "plain both": lambda: mx.value_and_grad(lambda x: nn.losses.cross_entropy(x, targets).sum())(logits),
            "fast value": lambda: cpu.cross_entropy(logits, targets),
            "fast both": lambda: cpu.cross_entropy_with_gradient(logits, targets),
        },
        repeats,
    )
    lines.append(("cross-entropy", *_nanoseconds(times, logits.size)))
    console.table(
        "Nanoseconds a number (value; value and gradient)", ("", "MLX", "MLX, both", "fast", "fast, both"), lines
    )


def _nanoseconds(times: dict[str, list[float]], count: int) -> list[str]:
    return [f"{statistics.median(spent) / count * 1e9:.2f}" for spent in times.values()]


def _step(directory: Path, given: argparse.Namespace) -> None:
    from stages.lora import patches
    import mlx.core as mx  # isort: skip
    import mlx.nn as nn

    from stages.lora.batches import collate
    from stages.lora.head import narrow_head
    from stages.lora.loss import fused_sum_loss, sum_loss

    rows = _rows(given)
    batch = collate(rows)
    plain, fast = _last_layers(directory), _last_layers(directory)
    if reason := patches.install(fast, rows):
        console.warn(reason)
    for model in (plain, fast):
        narrow_head(model)
    steps = {
        "MLX": (plain, sum_loss),
        "MLX, fused loss": (plain, fused_sum_loss),
        "kernels": (fast, sum_loss),
        "kernels, fused loss": (fast, fused_sum_loss),
    }
    ways: dict[str, Callable[[], Any]] = {
        name: partial(nn.value_and_grad(model, loss), model, batch) for name, (model, loss) in steps.items()
    }
    products = _products(plain, tokens=given.rows * given.tokens, trained=batch.trained_tokens)
    ways["the matmuls alone"] = partial(_multiply, products)
    peaks = {}
    for name, way in ways.items():
        mx.reset_peak_memory()
        mx.eval(way())
        peaks[name] = mx.get_peak_memory()
    times = _in_turn(ways, given.repeats)
    limit = statistics.median(times["the matmuls alone"])
    tokens = given.rows * given.tokens
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
    title = f"A step of {given.rows} × {given.tokens} tokens, {given.trained} of each trained; "
    title += f"matmuls {flops / 1e9:.1f} GFLOP at {flops / limit / 1e9:.0f} GFLOP/s"
    console.table(title, ("", "ms", "range", "tokens/s", "of the limit", "peak MB"), lines)


def _last_layers(directory: Path) -> Any:
    from stages.lora import adapter
    from stages.model.load import load_base

    model: Any = load_base(directory, dtype="float32")[0]
    options: dict[str, Any] = {"type": "lora", "rank": 8, "alpha": 16, "scale": None, "rank_stabilized": False}
    options |= {"dropout": 0.0, "targets": ["q_proj", "v_proj"], "layers": LAYERS}
    adapter.attach(model, adapter.configure(model, **options), seed=0)
    model.model.layers = model.model.layers[-LAYERS:]
    return model


def _rows(given: argparse.Namespace) -> Any:
    from stages.tokens.row import TokenRow

    mask = np.zeros(given.tokens + 1, dtype=bool)
    mask[-given.trained :] = True
    ids = np.random.default_rng(0).integers(0, 40_000, (given.rows, given.tokens + 1)).astype(np.int32)
    return [TokenRow(str(i), "random", row, mask, given.trained, False) for i, row in enumerate(ids)]


def _products(model: Any, *, tokens: int, trained: int) -> list[tuple[Any, Any]]:
    """Operands of each linear layer's product on the way forward and of that on the way back, and of the head's."""
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


def _in_turn(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way by name, one after another in each round, so that whatever else runs meets them all."""
    import mlx.core as mx

    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            mx.eval(way())
            times[name].append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
