"""Charts of the report: titles, axes with units, a table of the same numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from stages.reporting import charts, tables
from tests.support.numbers import EVALUATED

GROUPS = EVALUATED["slices"]["groups"]
CHARTS = {
    "losses": charts.losses([(5, 2.0), (10, 1.8)], [(0, 2.1), (10, 1.7)], 10),
    "changes": charts.changes([-0.31, -0.12, 0.04], better=2, worse=1),
    "slices": charts.slices("subject", GROUPS, tables.groups("", "subject", GROUPS)),
    "lengths": charts.lengths([(10, "train", 0), (20, "train", 3), (20, "test", 1)], 15),
}


def encodings(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for layer in spec["layer"]:
        yield from layer["encoding"].items()


def values(chart: charts.Chart, layer: int) -> list[dict[str, Any]]:
    return list(chart.spec["layer"][layer]["data"]["values"])


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_has_title_axes_and_numbers_in_words(name: str) -> None:
    chart = CHARTS[name]
    assert chart.name == name and chart.title and chart.caption and chart.description.endswith(".")
    titles = {axis: field["title"] for axis, field in encodings(chart.spec) if field.get("title")}
    assert set(titles) == ({"x"} if name == "slices" else {"x", "y"})  # the names of groups say what they are
    assert len(chart.table.lines) > 0
    assert all(len(line.cells) == len(chart.table.header) - 1 for line in chart.table.lines)


@pytest.mark.parametrize("name", CHARTS)
def test_the_colours_of_marks_are_those_of_the_page(name: str) -> None:
    text = json.dumps(CHARTS[name].spec)
    assert "#" not in text and "var(--" in text


def test_the_kept_step_is_marked() -> None:
    chart = charts.losses([(5, 2.0), (10, 1.8)], [(0, 2.1), (10, 1.7)], 5)
    assert values(chart, 0) == [{"step": 5, "label": "kept: step 5"}]
    assert [line.name for line in chart.table.lines] == ["0", "5 (kept)", "10"]


def test_losses_without_validation_have_one_curve() -> None:
    chart = charts.losses([(5, 2.0), (10, 1.8)], [], 10)
    assert {value["kind"] for value in values(chart, 2)} == {"training"}
    assert "validation" not in chart.description


def test_no_bar_holds_both_gains_and_losses() -> None:
    bars = values(charts.changes([-0.31, -0.12, -0.001, 0.0, 0.04], better=3, worse=1), 0)
    assert all(bar["to"] <= 0 or bar["from"] >= 0 for bar in bars)
    assert sum(bar["rows"] for bar in bars) == 5


def test_there_is_room_on_both_sides_of_zero() -> None:
    low, high = next(field["scale"]["domain"] for axis, field in encodings(CHARTS["changes"].spec) if axis == "x")
    assert low < 0 < high
    low, high = charts.changes([0.2], better=0, worse=1).spec["layer"][0]["encoding"]["x"]["scale"]["domain"]
    assert low < 0 < high


@pytest.mark.parametrize("differences", [[0.0, 0.0], [1e-9], [-250.0, 3.0]])
def test_changes_of_any_size_have_bars(differences: list[float]) -> None:
    bars = values(charts.changes(differences, better=0, worse=0), 0)
    assert sum(bar["rows"] for bar in bars) == len(differences)
    assert len(bars) <= 30 and all(bar["from"] < bar["to"] for bar in bars)


def test_max_length_is_marked_where_rows_are_longer() -> None:
    assert len(CHARTS["lengths"].spec["layer"]) == 2 and "15" in CHARTS["lengths"].caption
    longer = charts.lengths([(10, "train", 2)], 15)
    assert len(longer.spec["layer"]) == 1 and "15" not in longer.caption


def test_bins_without_rows_are_left_out_of_the_table() -> None:
    assert [(line.name, [cell.value for cell in line.cells]) for line in CHARTS["lengths"].table.lines] == [
        ("11 to 20", ["3", "1"])
    ]


def test_a_group_of_one_row_has_a_point_and_no_line() -> None:
    alone = GROUPS[0] | {"difference": {"value": -0.1, "low": None, "high": None}}
    chart = charts.slices("subject", [alone], tables.groups("", "subject", [alone]))
    assert values(chart, 1) == [] and len(values(chart, 2)) == 1
