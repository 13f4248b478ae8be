"""The report's page: text stays text, and the same inputs give the same bytes."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest

from stages.reporting.page import page
from tests.support.numbers import HOSTILE, run_of


def charts(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', html, re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


def test_the_same_run_gives_the_same_bytes() -> None:
    assert page(run_of()) == page(run_of())


def test_the_sentence_comes_first() -> None:
    html = page(run_of())
    heading = re.search(r"<h1>(.*?)</h1>", html)
    assert heading and heading[1].startswith("better on 3 of 4 rows; loss −0.500 [−0.600,")
    assert "<h1>" not in html.split("<h1>", 1)[1]


def test_text_of_the_user_is_shown_as_text() -> None:
    html = page(run_of())
    assert HOSTILE not in html and "&lt;/script&gt;&lt;b&gt;" in html
    sources = [value["source"] for value in charts(html)["changes"]["data"]["values"]]
    assert any(HOSTILE in source for source in sources)


@pytest.mark.parametrize("part", ["answers", "slices"])
def test_what_a_run_does_not_have_is_left_out(part: str) -> None:
    run = run_of()
    details = copy.deepcopy(dict(run.details))
    details["evaluate"][part] = None
    html = page(run_of(details=details, answers=[] if part == "answers" else run.answers))
    assert "By subject" in html if part == "answers" else "By subject" not in html
    assert ("No questions were asked" in html) == (part == "answers")


def test_a_run_without_validation_has_a_page() -> None:
    details = copy.deepcopy(dict(run_of().details))
    details["train"] = {"steps": 4, "loss": 1.0}
    assert "4 of 4" in page(run_of(details=details))


def test_nothing_in_the_page_points_to_a_network() -> None:
    html = page(run_of())
    outside = html.replace(html[html.index("(() => {") : html.index('<script type="application/json"')], "")
    assert not re.search(r"(src|href)=|https?://|@import|url\(", outside)
