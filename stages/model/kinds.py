"""Classes of modules that hold weights: linear, switch (a matrix for each expert), embedding; plain or quantised."""

from __future__ import annotations

import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

LINEAR = (nn.Linear, nn.QuantizedLinear)
SWITCH = (SwitchLinear, QuantizedSwitchLinear)  # the same matrix of every expert, stacked
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
