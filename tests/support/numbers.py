"""Numbers as evaluate writes them."""

from __future__ import annotations

from typing import Any


def estimate(value: float, width: float = 0.1) -> dict[str, float]:
    return {"value": value, "low": round(value - width, 4), "high": round(value + width, 4)}


_SCORES = ("exact_match", "normalized_match", "chrf", "rouge_l", "repetition", "tokens", "stopped")
_MODEL = {
    "loss": estimate(2.0),
    "perplexity": estimate(7.4),
    "bits_per_byte": estimate(2.4),
    "token_accuracy": estimate(0.4),
}
_GROUP = {
    "name": "물리",
    "rows": 3,
    "tokens": 90,
    "base": estimate(2.0),
    "adapter": estimate(1.5),
    "difference": estimate(-0.5),
    "rows_better": 3,
}
EVALUATED: dict[str, Any] = {
    "sentence": "better on 3 of 4 rows; loss −0.500 [−0.600, −0.400]",
    "power": "a difference half as large would take about 9 rows like these to be seen; there are 4",
    "rows": 4,
    "tokens": 120,
    "level": 0.95,
    "unit": "row",
    "units": 4,
    "models": {"base": _MODEL, "adapter": _MODEL | {"loss": estimate(1.5)}, "merged": _MODEL | {"loss": estimate(1.5)}},
    "difference": {
        "loss": estimate(-0.5),
        "bits_per_byte": estimate(-0.6),
        "token_accuracy": estimate(0.1),
        "rows_better": 3,
        "rows_worse": 1,
        "rows_needed": 9,
    },
    "slices": {"by": "subject", "groups": [_GROUP, _GROUP | {"name": ""}]},
    "answers": {
        "rows": 4,
        "max_tokens": 64,
        "format": None,
        "base": {name: estimate(0.2) for name in _SCORES},
        "tuned": {name: estimate(0.4) for name in _SCORES},
        "difference": {name: estimate(0.2) for name in _SCORES},
    },
    "forgetting": {"rows": 60, "tokens": 3000, "limit": None, "groups": [_GROUP | {"name": "all"}]},
}
