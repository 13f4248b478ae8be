"""The result at a glance, and files that are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.show import show
from tests.support.numbers import EVALUATED


@pytest.fixture
def details(tmp_path: Path) -> Path:
    path = tmp_path / "evaluate.json"
    path.write_text(json.dumps(EVALUATED))
    return path


def test_the_sentence_comes_last_with_the_reports_path(
    details: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "index.html"
    page.touch()
    show(details, page)
    lines = capsys.readouterr().out.replace("\n" + str(page), str(page)).splitlines()
    assert lines[-3:-1] == [EVALUATED["sentence"], EVALUATED["power"]]
    assert str(page) in lines[-1]


def test_tables_show_differences_with_their_interval(details: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(details, Path("none"))
    shown = capsys.readouterr().out
    assert "−0.500 [−0.600, −0.400]" in shown and "chrF" in shown and "Loss by subject" in shown


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "evaluate.json:1: damaged: not JSON"),
        (b"{\n{", "evaluate.json:2: damaged: not JSON"),
        (b"\xff\xfe", "evaluate.json: damaged: not JSON in UTF-8"),
        (b"[1]", "evaluate.json: damaged: not a JSON object"),
        (b"{}", "evaluate.json: not what evaluate writes"),
        (b'{"rows": "x", "tokens": 1, "models": {}}', "evaluate.json: not what evaluate writes"),
    ],
)
def test_damaged_numbers_are_named(details: Path, content: bytes, said: str) -> None:
    details.write_bytes(content)
    with pytest.raises(ValueError, match=r"; make it with: dvc repro$") as failure:
        show(details)
    assert said in str(failure.value)


def test_a_missing_file_is_named(details: Path) -> None:
    details.unlink()
    with pytest.raises(ValueError, match=r"evaluate.json: no such file; make it with: dvc repro"):
        show(details)
