"""The base model's loss, against transformers' model on PyTorch on the same tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from stages.base.manifest import read_manifest
from stages.baseline import baseline
from stages.fetch import fetch
from stages.prepare import prepare
from stages.tokenize import tokenize
from stages.tokens.parquet import read_tokens

pytestmark = pytest.mark.peers


def test_the_base_models_loss_is_that_of_transformers(project: Path, tiny_llama: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    for stage in (fetch, prepare, tokenize, baseline):
        stage()
    ours = pq.read_table("artifacts/baseline/rows.parquet").to_pydict()
    identity = read_manifest(Path("artifacts/base.json")).tokenizer_identity
    rows = read_tokens(Path("data/tokens/test.parquet"), tokenizer=identity)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    for row, loss, tokens in zip(rows, ours["base_loss"], ours["tokens"], strict=True):
        ids = torch.tensor(row.input_ids[None], dtype=torch.long)
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").numpy()
        theirs = losses[np.asarray(row.loss_mask[1:])].sum() / tokens
        assert loss / tokens == pytest.approx(theirs, abs=1e-3)
