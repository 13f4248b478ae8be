"""Charts of a run: a Vega-Lite specification each, and the same in words and in a table.

Colours are variables of the page's style sheet, so that a chart is dark where the page is, and light on paper.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.reporting.tables import NOTHING, Cell, Line, Table
from stages.reporting.text import visible
from stages.results import words

Spec = dict[str, Any]
Point = tuple[int, float]
_FONT = 'system-ui, -apple-system, "Segoe UI", "Apple SD Gothic Neo", "Malgun Gothic", "Noto Sans KR", sans-serif'
_QUIET = {"labelColor": "var(--soft)", "titleColor": "var(--soft)", "labelFontSize": 12, "titleFontSize": 12}
_CONFIG: Spec = {
    # The chart is one picture, with its description around it.
    "aria": False,
    "mark": {"aria": False},
    "background": "transparent",
    "font": _FONT,
    "view": {"stroke": None},
    "axis": {
        **_QUIET,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "labelOverlap": True,
        "gridColor": "var(--line)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
    },
    "axisX": {"grid": False},
    "legend": {**_QUIET, "orient": "top", "title": None, "labelFontSize": 13},
}
_FEW = 60  # points: more would hide the line
_BARS = 24


@dataclass(frozen=True)
class Chart:
    """A chart under its title: the specification, one sentence that says the same, and all numbers as a table."""

    name: str
    title: str
    caption: str
    description: str
    table: Table
    spec: Spec


def losses(train: Sequence[Point], valid: Sequence[Point], kept_step: int) -> Chart:
    """Loss in training and validation; a rule marks the step whose adapter was kept."""
    kinds = [kind for kind, points in (("training", train), ("validation", valid)) if points]
    values = [
        {"step": step, "loss": loss, "kind": kind}
        for kind, points in (("training", train), ("validation", valid))
        for step, loss in points
    ]
    last = max((step for step, _ in (*train, *valid)), default=0)
    scale = {"domain": kinds, "range": [f"var(--{kind})" for kind in kinds]}
    kept = {"values": [{"step": kept_step, "label": f"kept: step {kept_step:,}"}]}
    x = {
        "field": "step",
        "type": "quantitative",
        "title": "optimizer update",
        "scale": {"nice": False, "padding": 12},
        "axis": {"tickCount": 8, "tickMinStep": 1, "format": ",d"},
    }
    legend = {"symbolType": "stroke", "symbolSize": 500, "symbolStrokeWidth": 2}
    side: Spec = {"align": "right", "dx": -6} if 2 * kept_step > last else {"align": "left", "dx": 6}
    layers: list[Spec] = [
        {"data": kept, "mark": {"type": "rule", "color": "var(--text)", "strokeWidth": 1}, "encoding": {"x": x}},
        {
            "data": kept,
            "mark": {"type": "text", "y": 8, "color": "var(--text)", "fontSize": 12, "font": _FONT, **side},
            "encoding": {"x": x, "text": {"field": "label"}},
        },
        {
            "data": {"values": values},
            "mark": {"type": "line", "point": {"size": 36, "filled": True} if len(values) <= _FEW else False},
            "encoding": {
                "x": x,
                "y": {
                    "field": "loss",
                    "type": "quantitative",
                    "title": "loss (nats a token)",
                    "scale": {"zero": False},
                    "axis": {"tickCount": 5},
                },
                "color": {"field": "kind", "type": "nominal", "scale": scale, "legend": legend},
                "strokeDash": {
                    "field": "kind",
                    "type": "nominal",
                    "scale": {"domain": kinds, "range": [[1, 0], [6, 3]]},
                    "legend": legend,
                },
            },
        },
    ]
    told = [
        f"{kind} loss goes from {words.number(points[0][1])} to {words.number(points[-1][1])} at step {points[-1][0]:,}"
        for kind, points in (("Training", train), ("validation", valid))
        if points
    ]
    return Chart(
        "losses",
        "Loss while training",
        "Training loss is the mean of the updates since the last point, validation loss that of held-out rows.",
        f"Line chart. {'; '.join(told)}. The adapter of step {kept_step:,} was kept.",
        _loss_table(dict(train), dict(valid), kept_step),
        _spec(layer=layers, height=260),
    )


def _loss_table(train: Mapping[int, float], valid: Mapping[int, float], kept_step: int) -> Table:
    lines = [
        Line(
            f"{step:,} (kept)" if step == kept_step else f"{step:,}",
            [Cell(words.number(curve[step], 4) if step in curve else NOTHING) for curve in (train, valid)],
        )
        for step in sorted({*train, *valid})
    ]
    return Table("Loss by step, in nats a token", ("step", "training", "validation"), lines)


def changes(differences: Sequence[float], *, better: int, worse: int) -> Chart:
    """How many test rows changed how much in loss, in bars on either side of zero."""
    width = _round_width(max((abs(value) for value in differences), default=0.0) * 2 / _BARS)
    bars = Counter(math.floor(value / width) for value in differences)
    # At least one bar's room on each side of zero, so that it is clear which side is which.
    edges = {number: round(number * width, 9) for number in range(min(-1, *bars), max(0, *bars) + 2)}
    values = [{"from": edges[number], "to": edges[number + 1], "rows": rows} for number, rows in sorted(bars.items())]
    digits = max(0, -math.floor(math.log10(width)))
    lines = [
        Line(f"{words.change(bar['from'], digits)} to {words.change(bar['to'], digits)}", [Cell(f"{bar['rows']:,}")])
        for bar in values
    ]
    x = {
        "field": "from",
        "type": "quantitative",
        "bin": {"binned": True, "step": width},
        "title": "change in loss (nats a token)",
        "scale": {"domain": [min(edges.values()), max(edges.values())]},
        "axis": {"values": list(edges.values())},
    }
    zero = {
        "data": {"values": [{"zero": 0}]},
        "mark": {"type": "rule", "color": "var(--soft)", "strokeWidth": 1},
        "encoding": {"x": {"field": "zero", "type": "quantitative"}},
    }
    drawn = {
        "data": {"values": values},
        "mark": {"type": "bar", "binSpacing": 2},
        "encoding": {
            "x": x,
            "x2": {"field": "to"},
            "y": _rows_axis("rows"),
            "color": {"condition": {"test": "datum.from < 0", "value": "var(--gain)"}, "value": "var(--harm)"},
        },
    }
    return Chart(
        "changes",
        "Change in loss, row by row",
        "Left of zero are the test rows that the adapter predicts better than the base model.",
        f"Histogram. Loss falls in {better:,} of {len(differences):,} test rows, and rises in {worse:,}.",
        Table("Test rows by their change in loss", ("nats a token", "rows"), lines),
        _spec(layer=[drawn, zero], height=180),
    )


def _round_width(width: float) -> float:
    """The next larger of 1, 2 and 5 times a power of ten, or a millionth: smaller changes are rounding."""
    width = max(width, 1e-6)
    power = 10.0 ** math.floor(math.log10(width))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width * (1 - 1e-9))


def slices(by: str, groups: Sequence[Mapping[str, Any]], table: Table) -> Chart:
    """The change in loss of each group of test rows, with its interval."""
    values = [
        {"name": visible(line.name), **group["difference"]} for line, group in zip(table.lines, groups, strict=True)
    ]
    y = {
        "field": "name",
        "type": "nominal",
        "title": None,
        "sort": None,
        "axis": {"labelLimit": 130, "ticks": False, "domain": False},
    }
    x = {"type": "quantitative", "title": "change in loss (nats a token)", "axis": {"tickCount": 6}}
    layers: list[Spec] = [
        {
            "data": {"values": [{"zero": 0}]},
            "mark": {"type": "rule", "color": "var(--soft)", "strokeWidth": 1},
            "encoding": {"x": {"field": "zero", **x}},
        },
        {
            "data": {"values": [value for value in values if value["low"] is not None]},
            "mark": {"type": "rule", "color": "var(--validation)", "strokeWidth": 2},
            "encoding": {
                "x": {"field": "low", **x},
                "x2": {"field": "high"},
                "y": y,
            },
        },
        {
            "data": {"values": values},
            "mark": {"type": "point", "filled": True, "size": 70, "color": "var(--validation)", "opacity": 1},
            "encoding": {"x": {"field": "value", **x}, "y": y},
        },
    ]
    return Chart(
        "slices",
        f"Change in loss by {by}",
        "Left of zero is better. The line is the interval.",
        f"Dot plot. {'; '.join(f'{line.name}: {line.cells[-1].value}' for line in table.lines)}.",
        table,
        _spec(layer=layers, height=28 * len(groups)),
    )


def lengths(histogram: Sequence[tuple[int, str, int]], max_length: int) -> Chart:
    """How many rows have how many tokens, by split; a rule marks max_length where rows are that long."""
    width = min((length for length, _, _ in histogram), default=1)
    filled = [(length, split, rows) for length, split, rows in histogram if rows]
    splits = list(dict.fromkeys(split for _, split, _ in histogram))
    values = [
        {"from": length - width, "to": length, "split": split, "rows": rows, "order": splits.index(split)}
        for length, split, rows in filled
    ]
    scale = {"domain": splits, "range": [f"var(--{split})" for split in splits]}
    layers: list[Spec] = [
        {
            "data": {"values": values},
            "mark": {"type": "bar", "binSpacing": 1},
            "encoding": {
                "x": {
                    "field": "from",
                    "type": "quantitative",
                    "bin": {"binned": True, "step": width},
                    "title": "tokens a row",
                    "axis": {"tickCount": 8, "format": ",d"},
                },
                "x2": {"field": "to"},
                "y": _rows_axis("rows", stack="zero"),
                "color": {"field": "split", "type": "nominal", "scale": scale},
                "order": {"field": "order"},
            },
        }
    ]
    longest = max((length for length, _, _ in filled), default=0)
    if longest > max_length:
        layers.append(
            {
                "data": {"values": [{"at": max_length}]},
                "mark": {"type": "rule", "color": "var(--text)", "strokeDash": [4, 3]},
                "encoding": {"x": {"field": "at", "type": "quantitative"}},
            }
        )
    totals = Counter(dict.fromkeys(splits, 0))
    for _, split, rows in filled:
        totals[split] += rows
    told = ", ".join(f"{totals[split]:,} {split}" for split in splits)
    cut = f" The broken line is tokenize.max_length, {max_length:,}." if longest > max_length else ""
    return Chart(
        "lengths",
        "Tokens a row",
        f"Before anything was cut.{cut}",
        f"Histogram of {told} rows. The longest have {longest - width + 1:,} to {longest:,} tokens.",
        _length_table(filled, splits, width),
        _spec(layer=layers, height=200),
    )


def _length_table(filled: Sequence[tuple[int, str, int]], splits: Sequence[str], width: int) -> Table:
    counts = {(length, split): rows for length, split, rows in filled}
    lines = [
        Line(f"{length - width + 1:,} to {length:,}", [Cell(f"{counts.get((length, split), 0):,}") for split in splits])
        for length in sorted({length for length, _, _ in filled})
    ]
    return Table("Rows by their number of tokens", ("tokens", *splits), lines)


def _rows_axis(field: str, **more: Any) -> Spec:
    # Whole rows: a step of less than one would print some numbers twice.
    return {
        "field": field,
        "type": "quantitative",
        "title": "rows",
        "axis": {"tickMinStep": 1, "tickCount": 5, "format": ",d"},
        **more,
    }


def _spec(**parts: Any) -> Spec:
    return {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}, "config": _CONFIG, **parts}
