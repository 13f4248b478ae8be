"""Charts of a run as Vega-Lite specifications. Colours of text and lines are the page's, set when it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Spec = dict[str, Any]
BLUE, ORANGE, GREY = "#3f7fd9", "#d97a1f", "#8a8f98"


def losses(train: Sequence[dict[str, Any]], valid: Sequence[dict[str, Any]], kept_step: int) -> Spec:
    """Training and validation loss by step; a line at the step whose adapter was kept."""
    values = [{"step": row["step"], "loss": row["loss"], "kind": "training"} for row in train]
    values += [{"step": row["step"], "loss": row["valid_loss"], "kind": "validation"} for row in valid]
    colour = {
        "field": "kind",
        "type": "nominal",
        "title": None,
        "scale": {"domain": ["training", "validation"], "range": [BLUE, ORANGE]},
        "legend": {"orient": "top"},
    }
    kept = {"mark": {"type": "rule", "strokeDash": [4, 4], "color": GREY}, "data": {"values": [{"step": kept_step}]}}
    return _spec(
        values,
        layer=[
            kept | {"encoding": {"x": {"field": "step", "type": "quantitative"}}},
            {
                "mark": {"type": "line", "point": True},
                "encoding": {
                    "x": {"field": "step", "type": "quantitative", "title": "update"},
                    "y": {
                        "field": "loss",
                        "type": "quantitative",
                        "title": "loss, nats a token",
                        "scale": {"zero": False},
                    },
                    "color": colour,
                    "tooltip": [{"field": "kind"}, {"field": "step"}, {"field": "loss", "format": ".4f"}],
                },
            },
        ],
    )


def changes(rows: Sequence[dict[str, Any]]) -> Spec:
    """Each test row's change in loss, sorted: bars below zero are rows that got better."""
    ordered = sorted(rows, key=lambda row: float(row["change"]))
    values = [{"rank": rank, **row} for rank, row in enumerate(ordered, start=1)]
    return _spec(
        values,
        mark={"type": "bar"},
        encoding={
            "x": {"field": "rank", "type": "ordinal", "title": "test rows", "axis": {"labels": False, "ticks": False}},
            "y": {"field": "change", "type": "quantitative", "title": "change in loss, nats a token"},
            "color": {"condition": {"test": "datum.change < 0", "value": BLUE}, "value": ORANGE},
            "tooltip": [{"field": "source"}, {"field": "change", "format": "+.4f"}],
        },
    )


def lengths(histogram: Sequence[dict[str, Any]]) -> Spec:
    """How many rows have how many tokens, by split."""
    return _spec(
        histogram,
        mark={"type": "bar"},
        encoding={
            "x": {"field": "length", "type": "quantitative", "bin": {"maxbins": 40}, "title": "tokens a row"},
            "y": {"field": "rows", "aggregate": "sum", "type": "quantitative", "title": "rows"},
            "color": {
                "field": "split",
                "type": "nominal",
                "title": None,
                "scale": {"domain": ["train", "valid", "test"], "range": [BLUE, ORANGE, GREY]},
                "legend": {"orient": "top"},
            },
            "tooltip": [{"field": "split"}, {"field": "rows", "aggregate": "sum"}],
        },
    )


def _spec(values: Sequence[dict[str, Any]], **parts: Any) -> Spec:
    return {"data": {"values": list(values)}, "width": "container", "height": 220, **parts}
