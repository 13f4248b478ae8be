"""Tables of the report: verdicts follow from intervals, and the rows add up."""

from __future__ import annotations

from typing import Any

import pytest

from stages.reporting import tables
from tests.support.numbers import EVALUATED, estimate


def changed(name: str, change: dict[str, Any]) -> tables.Cell:
    numbers = EVALUATED["answers"] | {"difference": {name: change}}
    return tables.answers(numbers).lines[0].cells[-1]


@pytest.mark.parametrize(
    ("name", "change", "verdict"),
    [
        ("chrf", estimate(0.3), "better"),
        ("chrf", estimate(-0.3), "worse"),
        ("chrf", estimate(0.05), "no clear difference"),
        ("repetition", estimate(0.3), "worse"),
        ("repetition", estimate(-0.3), "better"),
        ("tokens", estimate(-0.3), ""),
        ("chrf", {"value": 0.3, "low": None, "high": None}, "no clear difference"),
    ],
)
def test_a_verdict_follows_from_the_interval(name: str, change: dict[str, Any], verdict: str) -> None:
    assert changed(name, change).verdict == verdict


def test_a_difference_shows_sign_and_interval() -> None:
    cell = changed("rouge_l", estimate(-0.3))
    assert (cell.value, cell.interval) == ("−0.300", "[−0.400, −0.200]")


def test_a_metric_without_a_difference_shows_none() -> None:
    lines = {line.name: line for line in tables.metrics(EVALUATED).lines}
    assert lines["perplexity"].cells[-1] == tables.Cell("–")
    assert lines["loss"].cells[-1].verdict == "better"


def test_every_metric_is_explained() -> None:
    table = tables.metrics(EVALUATED)
    assert all(line.meaning.endswith(".") for line in table.lines)
    assert all(line.meaning.endswith(".") for line in tables.answers(EVALUATED["answers"]).lines)


def test_a_group_without_a_name_has_one_to_read() -> None:
    names = [line.name for line in tables.groups("", "subject", EVALUATED["slices"]["groups"]).lines]
    assert names == ["물리", "(none)"]


def test_the_rows_of_a_ledger_add_up_by_reason() -> None:
    counts = {"rows_in": 5, "rows_used": 2, "dropped_bad": 1, "dropped_empty": 0, "dropped_long": 2, "tokens": 9}
    none = dict.fromkeys(counts, 0)
    ledger = tables.ledger("prepare", {"train": counts, "valid": none, "test": none, "all": counts})
    assert ledger.table.title == "Prepare: 5 rows in = 2 used + 3 dropped"
    assert [(line.name, [cell.value for cell in line.cells]) for line in ledger.table.lines] == [
        ("rows in", ["5", "0", "0", "5"]),
        ("dropped: bad", ["1", "0", "0", "1"]),
        ("dropped: long", ["2", "0", "0", "2"]),
        ("rows used", ["2", "0", "0", "2"]),
        ("tokens", ["9", "0", "0", "9"]),
    ]
    assert ledger.zero == ["dropped: empty"]


@pytest.mark.parametrize(
    ("value", "limit", "said"),
    [
        (-0.5, None, "nothing forgotten on 60 general texts: loss −0.500 [−0.600, −0.400]"),
        (0.5, 0.05, "something was forgotten on 60 general texts: loss +0.500 [+0.400, +0.600]; the limit is +0.050"),
        (0.05, None, "no clear change on 60 general texts: loss +0.050 [−0.050, +0.150]"),
    ],
)
def test_forgetting_is_one_line(value: float, limit: float | None, said: str) -> None:
    group = EVALUATED["forgetting"]["groups"][0] | {"difference": estimate(value)}
    assert tables.forgetting({"rows": 60, "limit": limit, "groups": [group]}) == said
