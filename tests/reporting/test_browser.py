"""The report's page in headless Chromium with the network off, and the pages of `dvc plots`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.reporting.page import page
from tests.support.numbers import run_of

pytestmark = pytest.mark.browser
SIZES = [(width, scheme) for width in (390, 1280) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path, "no Chromium: install the system's (Debian: apt-get install chromium)"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "index.html"
    path.write_text(page(run_of()), encoding="utf-8")
    return path


def opened(chromium: Any, path: Path, *, width: int = 1280, scheme: str = "light") -> tuple[Any, list[str], list[str]]:
    """The page, what it complained of, and the addresses that it asked for besides its own."""
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    tab = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    tab.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(path.as_uri())
    tab.wait_for_selector("svg path, svg rect", state="attached")
    tab.wait_for_timeout(300)
    return tab, complaints, [url for url in requests if url != path.as_uri()]


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_it_opens_without_a_network_or_a_complaint(chromium: Any, report: Path, width: int, scheme: str) -> None:
    tab, complaints, requests = opened(chromium, report, width=width, scheme=scheme)
    assert (complaints, requests) == ([], [])
    for name in ("changes", "losses", "lengths"):
        assert tab.locator(f"#{name} svg .mark-rect path, #{name} svg .mark-line path").count() > 0, name
    assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_everybody_can_read_it(chromium: Any, report: Path, width: int, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    tab, _, _ = opened(chromium, report, width=width, scheme=scheme)
    found = Axe().run(tab).response["violations"]
    assert [(fault["id"], fault["impact"]) for fault in found if fault["impact"] in ("serious", "critical")] == []


def test_the_filter_filters_and_the_order_orders(chromium: Any, report: Path) -> None:
    tab, _, _ = opened(chromium, report)
    articles = tab.locator("#answers article")
    assert articles.count() == 4
    tab.fill("#filter", "흩어진다 2")
    assert tab.locator("#answers article:visible").count() == 1
    assert tab.inner_text("#count") == "1 of 4"
    tab.fill("#filter", "")
    tab.select_option("#sort", "gain")
    gains = articles.evaluate_all("all => all.map(one => Number(one.dataset.gain))")
    assert gains == sorted(gains, reverse=True)
    tab.select_option("#sort", "loss")
    assert articles.evaluate_all("all => all.map(one => Number(one.dataset.gain))") == sorted(gains)


def test_on_paper_all_answers_are_there(chromium: Any, report: Path) -> None:
    tab, _, _ = opened(chromium, report)
    tab.fill("#filter", "흩어진다 2")
    tab.emulate_media(media="print")
    assert tab.locator("#answers article:visible").count() == 4
    assert not tab.locator(".controls").is_visible()


def test_charts_follow_a_change_of_light(chromium: Any, report: Path) -> None:
    tab, _, _ = opened(chromium, report, scheme="light")
    colour = "getComputedStyle(document.querySelector('#losses .role-axis-title text')).fill"
    before = tab.evaluate(colour)
    tab.emulate_media(color_scheme="dark")
    tab.wait_for_timeout(500)
    assert tab.evaluate(colour) != before


def test_dvcs_plots_are_drawn_without_a_network(chromium: Any, tmp_path: Path) -> None:
    import sys

    from stages.plots import plots

    (tmp_path / "loss.csv").write_text("step,loss\n1,2.0\n2,1.5\n3,1.2\n")
    (tmp_path / "dvc.yaml").write_text("plots:\n  - loss.csv:\n      x: step\n      y: loss\n")
    dvc = [sys.executable, "-m", "dvc"]
    for command in (["init", "--no-scm", "--quiet"], ["config", "plots.html_template", "plots.html"]):
        subprocess.run([*dvc, *command], cwd=tmp_path, check=True)
    plots(tmp_path / ".dvc" / "plots.html")
    subprocess.run([*dvc, "plots", "show"], cwd=tmp_path, check=True, capture_output=True)
    tab, complaints, requests = opened(chromium, tmp_path / "dvc_plots" / "index.html")
    # DVC writes charts for Vega-Lite 5 that have no data yet where they are first drawn: Vega warns of both.
    assert [said for said in complaints if "Infinite extent" not in said and "Vega-Lite v5" not in said] == []
    assert requests == []
    assert tab.locator("svg .mark-line path, canvas").count() > 0
