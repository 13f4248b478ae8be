"""The report's page in headless Chromium with the network off, and the pages of `dvc plots` (`make test-browser`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from stages.plots import plots
from tests.support.report_run import HOSTILE, ROWS

pytestmark = pytest.mark.browser
VIEWS = [(width, scheme) for width in (390, 1280) for scheme in ("light", "dark")]
CHARTS = ("changes", "slices", "losses", "lengths")
MARKS = ".mark-rect path, .mark-line path, .mark-symbol path, .mark-rule line"


@dataclass(frozen=True)
class Tab:
    """An open page, the addresses that it asked for, and what it complained of."""

    page: Any
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path, "Chromium is needed: on Debian, apt-get install chromium fonts-nanum"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


def opened(chromium: Any, path: Path, width: int = 1280, scheme: str = "light") -> Tab:
    """A page from a file, without a network, once all its charts are drawn."""
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    tab = Tab(context.new_page())
    tab.page.on("request", lambda request: tab.requests.append(request.url))
    tab.page.on("console", lambda said: tab.errors.append(said.text) if said.type == "error" else None)
    tab.page.on("pageerror", lambda error: tab.errors.append(str(error)))
    tab.page.goto(path.as_uri())
    tab.page.wait_for_function(
        "[...document.querySelectorAll('.chart, .vega-embed')].every(place => place.querySelector('svg, canvas'))"
    )
    return tab


@pytest.fixture(scope="module", params=VIEWS, ids=lambda view: f"{view[0]}-{view[1]}")
def view(chromium: Any, finished: Path, request: pytest.FixtureRequest) -> Tab:
    """The report, in each width and light."""
    return opened(chromium, finished / "artifacts" / "report" / "index.html", *request.param)


@pytest.fixture
def tab(chromium: Any, finished: Path) -> Tab:
    return opened(chromium, finished / "artifacts" / "report" / "index.html")


def shown(tab: Tab) -> list[str]:
    """The headings of the answers that are visible, in their order."""
    headings: list[str] = tab.page.locator("#answer-list .answer:visible h3").all_inner_texts()
    return headings


def test_no_request_leaves_the_page(view: Tab) -> None:
    assert [url for url in view.requests if not url.startswith("file://")] == []
    assert len(view.requests) == 1


def test_there_is_no_error(view: Tab) -> None:
    assert view.errors == []


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_has_marks(view: Tab, name: str) -> None:
    marks = view.page.locator(f"#chart-{name} svg").locator(MARKS)
    assert marks.count() > 0
    assert any(box and (box["width"] > 1 or box["height"] > 1) for box in (mark.bounding_box() for mark in marks.all()))


def test_nothing_is_wider_than_the_screen(view: Tab) -> None:
    assert view.page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
    wide = "[...document.querySelectorAll('main *')].filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1)"
    assert view.page.evaluate(f"{wide}.filter(e => !e.closest('thead, svg')).map(e => e.outerHTML.slice(0, 99))") == []


def test_everybody_can_read_it(view: Tab) -> None:
    from axe_playwright_python.sync_playwright import Axe

    faults = Axe().run(view.page).response["violations"]
    assert [(fault["id"], fault["impact"]) for fault in faults if fault["impact"] in ("serious", "critical")] == []


def test_hostile_text_is_text(view: Tab) -> None:
    assert view.page.title().startswith("better on")
    body = view.page.inner_text("body")
    assert all(text in body for text in (HOSTILE[0], HOSTILE[1], HOSTILE[4], "[U+202E]"))
    assert view.page.locator("img, iframe, object").count() == 0


def test_charts_follow_a_change_of_light(tab: Tab) -> None:
    colour = "getComputedStyle(document.querySelector('#chart-losses .mark-line path')).stroke"
    light = tab.page.evaluate(colour)
    tab.page.emulate_media(color_scheme="dark")
    assert tab.page.evaluate(colour) != light


def test_the_filter_filters(tab: Tab) -> None:
    assert len(shown(tab)) == ROWS
    tab.page.fill("#filter", "훈민정음")
    assert shown(tab) == ["Answer 5", "Answer 13", "Answer 21"]
    assert tab.page.inner_text("#shown") == f"3 of {ROWS} answers"
    tab.page.fill("#filter", "onerror")
    assert shown(tab) == ["Answer 21"]
    tab.page.fill("#filter", "chrF")  # a word of the page, of no answer
    assert shown(tab) == []


def test_a_decomposed_word_finds_a_composed_one(tab: Tab) -> None:
    tab.page.fill("#filter", "\u1112\u116e\u11ab\u1106\u1175\u11ab")  # 훈민, as macOS may paste it
    assert len(shown(tab)) == 3


@pytest.mark.parametrize(("kind", "key"), [("chrf", "chrf"), ("loss", "loss")])
def test_the_order_is_that_of_the_gains(tab: Tab, kind: str, key: str) -> None:
    original = shown(tab)
    gains = f"[...document.querySelectorAll('.answer[data-{key}]')].map(answer => Number(answer.dataset.{key}))"
    tab.page.select_option("#order", f"{kind}-most")
    assert tab.page.evaluate(gains) == sorted(tab.page.evaluate(gains), reverse=True)
    assert shown(tab) != original
    tab.page.select_option("#order", f"{kind}-least")
    assert tab.page.evaluate(gains) == sorted(tab.page.evaluate(gains))
    tab.page.select_option("#order", "original")
    assert shown(tab) == original


def test_on_paper_all_answers_are_there(tab: Tab) -> None:
    tab.page.fill("#filter", "훈민정음")
    tab.page.emulate_media(media="print", color_scheme="dark")
    assert len(shown(tab)) == ROWS
    assert not tab.page.locator("#controls").is_visible()
    assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_without_scripts_the_numbers_are_there(chromium: Any, finished: Path) -> None:
    context = chromium.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto((finished / "artifacts" / "report" / "index.html").as_uri())
    assert page.locator("#answer-list .answer:visible").count() == ROWS
    assert not page.locator("#controls").is_visible()
    assert "Its numbers are in the table below." in page.inner_text("#chart-losses")


@pytest.fixture(scope="module")
def dvc_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DVC repository with a plot that changed since its commit, and the page for it."""
    folder = tmp_path_factory.mktemp("dvc")
    (folder / "loss.csv").write_text("step,loss\n1,2.0\n2,1.5\n3,1.2\n")
    (folder / "dvc.yaml").write_text("plots:\n  - loss.csv:\n      x: step\n      y: loss\n")
    run(folder, "git", "init", "--quiet")
    run(folder, sys.executable, "-m", "dvc", "init", "--quiet")
    run(folder, sys.executable, "-m", "dvc", "config", "plots.html_template", "plots.html")
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--message", "plots")
    (folder / "loss.csv").write_text("step,loss\n1,2.1\n2,1.4\n3,1.1\n")
    plots(folder / ".dvc" / "plots.html")
    return folder


def run(folder: Path, *command: str) -> None:
    who = {f"GIT_{role}_{what}": "test@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    subprocess.run(command, cwd=folder, env=os.environ | who, check=True, capture_output=True)


@pytest.mark.parametrize(("command", "lines"), [("show", 1), ("diff", 2)])
def test_dvcs_plots_are_drawn_without_a_network(chromium: Any, dvc_project: Path, command: str, lines: int) -> None:
    run(dvc_project, sys.executable, "-m", "dvc", "plots", command)
    tab = opened(chromium, dvc_project / "dvc_plots" / "index.html")
    assert len(tab.requests) == 1 and tab.errors == []
    # DVC has its charts drawn on a canvas: the same chart can be asked for its marks.
    drawn = tab.page.evaluate("vegaEmbed(document.body, spec, {renderer: 'svg'}).then(() => 0)")
    assert drawn == 0
    assert tab.page.locator("svg .mark-line path").count() >= lines
