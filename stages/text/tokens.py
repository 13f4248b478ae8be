"""A row of data/tokens, and the tokenizer that makes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row of data/tokens. `loss_mask[i]` says whether predicting `input_ids[i]` is trained on and scored."""

    id: str
    source: str
    input_ids: np.ndarray  # int32, (L,)
    loss_mask: np.ndarray  # bool, (L,); the first is never set: nothing precedes it to predict it from
    trained_bytes: int  # UTF-8 bytes of the text that the mask covers
    truncated: bool


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The model directory's tokenizer, in its fast form, which knows character offsets.

    Raises:
        ValueError: there is none, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {directory.name} has no fast form (tokenizer.json), which offsets need")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {directory.name} names no EOS token, without which generation never stops")
    return tokenizer
