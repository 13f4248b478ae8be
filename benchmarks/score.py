"""Held-out loss of several adapters: nats a token on the same rows, by the plain model without any speed-up.

`python -m benchmarks.score GROUND KIND OUT ADAPTER …` scores the held-out rows of a ground; the base comes first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stages.base.manifest import read_manifest
from stages.model import blas

if TYPE_CHECKING:
    from stages.tokens.row import TokenRow

BATCH_SIZE = 4


def losses(model_dir: Path, adapters: Sequence[Path], rows: Sequence[TokenRow]) -> list[tuple[float, float]]:
    """Of the base and of each adapter, all of one shape: over all trained tokens, and without the EOS of each row."""
    import mlx.nn as nn
    import numpy as np

    from stages.lora import adapter, adapter_files
    from stages.lora.batches import collate, sorted_batches
    from stages.model.load import load_base

    model, _ = load_base(model_dir, dtype="float32")
    order = sorted_batches([len(row.input_ids) for row in rows], batch_size=BATCH_SIZE)
    batches = [collate([rows[i] for i in indices]) for indices in order]

    def score() -> tuple[float, float]:
        found, is_eos = [], []
        for batch in batches:
            logits_BxLxV = model(batch.inputs_BxL)
            logits_NxV = logits_BxLxV.reshape(-1, logits_BxLxV.shape[-1])[batch.trained_N]
            found.append(np.array(nn.losses.cross_entropy(logits_NxV, batch.targets_N)).astype(np.float64))
            is_eos.append(np.append(np.diff(batch.rows_N) > 0, True))
        losses_N, is_eos_N = np.concatenate(found), np.concatenate(is_eos)
        return float(losses_N.mean()), float(losses_N[~is_eos_N].mean())

    scores = [score()]
    for number, directory in enumerate(adapters):
        if number == 0:
            adapter.attach(model, adapter_files.read_config(directory), seed=0)
        model.load_weights(str(directory / adapter_files.WEIGHTS_FILE), strict=False)
        scores.append(score())
    return scores


def main() -> None:
    blas.preload()
    from stages.tokens.parquet import read_tokens

    ground, kind, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    identity = read_manifest(ground / "base.json").tokenizer_identity
    rows = read_tokens(ground / kind / "tokens" / "test.parquet", tokenizer=identity)
    scores = losses(ground / "float32", [Path(name) for name in sys.argv[4:]], rows)
    out.write_text(json.dumps([score for score, _ in scores]))


if __name__ == "__main__":
    main()
