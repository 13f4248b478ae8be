"""Numbers as evaluate writes them, and a whole run for the report."""

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

HOSTILE = "</script><b>굵게</b>\u202e\x07"


def run_of(**changes: Any) -> Any:
    """A run of four rows, as the report takes it; `changes` go over its parts."""
    from stages.reporting.page import Run

    counts = {name: {"rows_in": 4, "rows_used": 4, "dropped_bad": 0} for name in ("train", "valid", "test", "all")}
    names = ("물.jsonl:1", "b:2", f"{HOSTILE}:3", "d:4")
    rows = [
        {"id": str(i), "source": name, "tokens": 30, "base_loss": 60.0, "adapter_loss": 45.0 + 6 * i}
        for i, name in enumerate(names)
    ]
    answers = [
        {
            "id": str(i),
            "source": name,
            "prompt": f"### 질문:\n{'바다는 왜 파란가요? ' * 4}{HOSTILE}",
            "reference": "빛이 물에서 흩어지기 때문이다. " * 6,
            "base": "" if i else "def f(x):\n    return '<b>' * " + "9" * 200,
            "tuned": f"파란 빛이 흩어진다 {i}",
            "base_chrf": 10.0,
            "tuned_chrf": 5.0 + 10 * i,
        }
        for i, name in enumerate(names)
    ]
    parts: dict[str, Any] = {
        "details": {
            "prepare": counts,
            "tokenize": counts,
            "train": {"steps": 40, "kept_step": 20, "valid_loss_before": 2.0, "valid_loss": 1.5},
            "merge": {"rows": 4, "mean_divergence": 0.0},
            "evaluate": EVALUATED,
        },
        "rows": rows,
        "answers": answers,
        "samples": [{"prompt": "하나?", "base": "", "merged": "둘."}],
        "curves": {
            "loss": [{"step": 10.0 * i, "loss": 2 - 0.1 * i} for i in range(1, 5)],
            "valid_loss": [{"step": 20.0 * i, "valid_loss": 2 - 0.2 * i} for i in range(3)],
            "lengths": [{"length": 30.0 + 2 * i, "split": "train", "rows": 3.0 + i} for i in range(9)],
        },
        "base": {"source": "org/model", "revision": "a" * 40, "architecture": "llama", "license": None},
        "params": {"seed": 0, "train": {"iters": 40}},
        "versions": {"mlx": "0.32.4"},
        "hashes": {"data/raw/물.jsonl": "f" * 64},
    }
    return Run(**parts | changes)
