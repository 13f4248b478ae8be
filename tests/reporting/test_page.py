"""The report's page: what it says and in which order, text that stays text, the same bytes each time."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from stages.params.loading import load_params
from stages.report import report
from tests.support.report_run import HOSTILE, write_run

VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """The elements of a page, and its text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.headings: list[str] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & {*self._open}:
            self.texts.append(data)
        if "h2" in self._open:
            self.headings.append(data)


@pytest.fixture(scope="session")
def page(html: str) -> Page:
    return Page(html)


def test_the_sentence_comes_first(html: str, page: Page) -> None:
    sentence = re.search(r"<h1>(.*?)</h1>", html)
    assert sentence and "better on 22 of 24 rows;" in sentence[1] and "loss −0.187" in sentence[1]
    assert next(tag for tag, _ in page.elements if re.fullmatch(r"h\d", tag)) == "h1"


def test_the_sections_are_in_order(page: Page) -> None:
    assert page.headings == [
        "Metrics", "Training", "Answers", "Free samples", "Data", "The merged model is what the adapter was",
        "Parameters", "Provenance",
    ]  # fmt: skip


def test_links_lead_to_sections(page: Page) -> None:
    links = {attributes["href"] for tag, attributes in page.elements if tag == "a"}
    assert links == {f"#{attributes['id']}" for tag, attributes in page.elements if tag == "section"}


def test_hostile_text_is_text(page: Page) -> None:
    shown = "\n".join(page.texts)
    for text in (HOSTILE[0], HOSTILE[1], HOSTILE[4], "[U+0000][U+0008][U+001B][31m빨강[U+007F]", "[U+202E]אבג"):
        assert text in shown
    assert not any(tag in ("img", "b") and "class" not in attributes for tag, attributes in page.elements)
    assert sum(tag == "script" for tag, _ in page.elements) == 3


def test_hostile_text_in_a_chart_ends_no_script(html: str) -> None:
    content = re.search(r'<script type="application/json" id="charts">(.*?)</script>', html, re.DOTALL)
    assert content
    specs: dict[str, Any] = json.loads(content[1])
    names = [value["name"] for value in specs["slices"]["layer"][2]["data"]["values"]]
    assert HOSTILE[0] in names


def test_no_control_characters_are_left(html: str) -> None:
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)


def test_korean_text_says_that_it_is_korean(page: Page) -> None:
    languages = [attributes.get("lang") for _, attributes in page.elements if attributes.get("class") == "text"]
    assert "ko" in languages and "" in languages and None not in languages


def test_nothing_points_to_a_network(page: Page) -> None:
    assert not [value for _, attributes in page.elements for key, value in attributes.items() if key == "src"]
    links = {str(attributes.get("href")) for _, attributes in page.elements if "href" in attributes}
    assert all(link.startswith("#") for link in links)


def test_no_script_runs_but_the_pages_own(html: str, page: Page) -> None:
    policy = next(str(attributes["content"]) for _, attributes in page.elements if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none';")
    assert len(re.findall(r"'sha256-[^']{44}'", policy)) == 2 and "unsafe" not in policy.split("script-src")[1]


def test_all_parameters_are_there_but_the_runtime_ones(finished: Path, page: Page) -> None:
    shown = set(page.texts)
    for section, values in load_params(finished / "params.yaml").model_dump().items():
        if isinstance(values, dict):
            assert (section in shown) == (section != "runtime")
            assert all((key in shown) == (section != "runtime") for key in values)


def test_provenance_names_base_versions_and_files(page: Page) -> None:
    shown = "\n".join(page.texts)
    for text in ("smollm2-135m-instruct", "not stated", "0.32.4", "24db" * 16, "artifacts/merged/model.safetensors"):
        assert text in shown


def test_a_known_licence_is_named(run_folder: Path) -> None:
    path = run_folder / "artifacts" / "base.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"license": "apache-2.0"}))
    report()
    assert "apache-2.0" in Path("artifacts/report/index.html").read_text(encoding="utf-8")


def test_the_machine_is_not_in_it(html: str, finished: Path) -> None:
    assert str(finished) not in html and str(Path.home()) not in html


def test_the_same_files_give_the_same_bytes_wherever_they_lie(
    finished: Path, run_folder: Path, html: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Seoul")
    report()
    assert Path("artifacts/report/index.html").read_text(encoding="utf-8") == html


def test_what_a_run_does_not_have_is_left_out_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_run(tmp_path / "run", answers=False, slices=False))
    report()
    page = Page(Path("artifacts/report/index.html").read_text(encoding="utf-8"))
    shown = "\n".join(page.texts)
    assert "No slices: evaluate.slice_by names no column." in shown
    assert "No test row was answered" in shown and "Largest gain" not in shown
    assert "answer-list" not in {attributes.get("id") for _, attributes in page.elements}


def test_a_run_without_validation_or_samples_has_a_page(run_folder: Path) -> None:
    Path("artifacts/plots/valid_loss.csv").write_text("step,valid_loss\n")
    Path("artifacts/details/train.json").write_text('{"steps": 40}')
    Path("artifacts/samples/samples.jsonl").write_text("")
    report()
    shown = "\n".join(Page(Path("artifacts/report/index.html").read_text(encoding="utf-8")).texts)
    assert "40 (kept)" in shown and "There are no prompts to answer." in shown
