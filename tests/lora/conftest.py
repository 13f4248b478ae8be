"""Rows and a model for the numerical core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.lora.model import load_base
from stages.text.tokens import TokenRow


def token_row(number: int, length: int, *, trained: int, seed: int = 0) -> TokenRow:
    """A row of random bytes whose last `trained` tokens count."""
    rng = np.random.default_rng([seed, number])
    mask = np.zeros(length, dtype=bool)
    mask[-trained:] = True
    return TokenRow(
        f"row{number}", f"rows.jsonl:{number}", rng.integers(0, 256, length).astype(np.int32), mask, trained, False
    )


@pytest.fixture
def rows() -> list[TokenRow]:
    """Eleven rows of different lengths, so that four do not divide them."""
    return [token_row(i, 6 + 3 * i, trained=2 + i) for i in range(11)]


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    """The frozen tiny Llama in float32."""
    return load_base(tiny_llama, dtype="float32")[0]
