"""Upper limit of the speed: a step's matrix products alone, at the BLAS's own speed.

`python -m benchmarks.limit GROUND KIND OUT`: the products that no saving removes, once the frozen layers' output
is cached: forward through the adapted layers, backward through them but for the q, k and v of the first (nothing below
asks for a gradient), the head on trained positions forward and backward. Each shape is timed as it occurs.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.ground import LORA
from stages.model import blas

Product = tuple[int, int, int, bool, float]  # rows, inner, columns, is the right side transposed, how often


def products(
    config: dict[str, Any], *, tokens: int, trained: int, length: float, lora: dict[str, Any]
) -> list[Product]:
    """The products of one update over `tokens` real tokens, `trained` of which count, in rows of a mean `length`."""
    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, size = config["num_attention_heads"], config.get("head_dim") or width // config["num_attention_heads"]
    query, key = heads * size, config["num_key_value_heads"] * size
    layers, rank = lora["layers"], lora["rank"]
    qkv = [(width, query), (width, key), (width, key)]
    rest = [(query, width), (width, inner), (width, inner), (inner, width)]
    found: list[Product] = []
    for shapes, backward in ((qkv, layers - 1), (rest, layers)):
        for inside, outside in shapes:
            found += [(tokens, inside, outside, True, layers), (tokens, outside, inside, False, backward)]
    # Low rank: forward, and the gradients of A, of B and of what is between.
    for inside, outside in (qkv[0], qkv[2]):
        found += [(tokens, inside, rank, False, 2 * layers), (tokens, rank, outside, False, 3 * layers)]
    # Scores and their use, two products forward and four backward, of all heads: each row against its own length.
    found += [(tokens, query, round(length), True, 6 * layers)]
    found += [(trained, width, vocabulary, True, 1), (trained, vocabulary, width, False, 1)]
    return found


def seconds(product: Product, repeats: int = 5) -> float:
    """Of one such product in float32."""
    import mlx.core as mx

    rows, inner, columns, transposed, _ = product
    left = mx.random.normal((rows, inner))
    right = mx.random.normal((columns, inner)).T if transposed else mx.random.normal((inner, columns))
    mx.eval(left, right)

    def once() -> float:
        started = time.perf_counter()
        mx.eval(left @ right)
        return time.perf_counter() - started

    return min(once() for _ in range(repeats))


def _batches(path: Path) -> Iterator[tuple[int, int, float]]:
    for rows in json.loads(path.read_text())["train"]:
        lengths = [len(row["ids"]) for row in rows]
        trained = sum(len(row["ids"]) - max(row["first"], 1) for row in rows)
        yield sum(lengths), trained, statistics.mean(lengths)


def main() -> None:
    blas.preload()
    ground, kind, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    config = json.loads((ground / "float32" / "config.json").read_text())
    tokens, trained, length = map(statistics.mean, zip(*_batches(ground / kind / "rows.json"), strict=True))
    found = products(config, tokens=round(tokens), trained=round(trained), length=length, lora=LORA)
    flops = sum(2.0 * rows * inner * columns * times for rows, inner, columns, _, times in found)
    spent = sum(seconds(product) * product[-1] for product in found)
    figures = {
        "flops_per_token": flops / tokens,
        "gflops_per_second": flops / spent / 1e9,
        "tokens_per_second": tokens / spent,
    }
    out.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
