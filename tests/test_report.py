"""The report stage: one page, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.report import report
from tests.support.report_run import write_run


@pytest.fixture(autouse=True)
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_run(tmp_path / "run")
    monkeypatch.chdir(folder)
    return folder


def test_it_says_the_sentence_and_where_the_page_is(capsys: pytest.CaptureFixture[str]) -> None:
    report()
    said = capsys.readouterr().out
    assert "better on 22 of 24 rows" in said and "artifacts/report/index.html" in said


def test_a_parameter_from_the_command_line_is_shown() -> None:
    report(overrides=["merge.min_survival=0.0625"])
    assert "0.0625" in Path("artifacts/report/index.html").read_text(encoding="utf-8")


def test_a_missing_input_leaves_the_old_page() -> None:
    report()
    before = Path("artifacts/report/index.html").read_bytes()
    Path("artifacts/details/merge.json").unlink()
    with pytest.raises(ValueError, match=r"make it with: python -m stages\.merge"):
        report()
    assert Path("artifacts/report/index.html").read_bytes() == before


def test_a_folder_with_other_files_is_not_replaced() -> None:
    Path("artifacts/report").mkdir()
    Path("artifacts/report/mine.html").touch()
    with pytest.raises(ValueError, match=r"holds mine\.html, which this stage did not make"):
        report()
