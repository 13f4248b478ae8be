"""A row of data/tokens in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Token ids and the loss mask. Where `loss_mask[i]` is set, predicting `input_ids[i]` is trained on and scored."""

    id: str
    source: str
    input_ids: np.ndarray  # int32, (L,)
    loss_mask: np.ndarray  # bool, (L,); the first is never set: nothing precedes it to predict it from
    trained_bytes: int  # UTF-8 bytes of the text that the mask covers
    truncated: bool
    group: str | None = None  # of a test row: its value of prepare.group_by's column
    carried: Mapping[str, str] = field(default_factory=dict)  # of a test row: its values of prepare.carry's columns
