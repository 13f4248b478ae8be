"""A finished run's files, and the page of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stages.report import report
from tests.support.report_run import write_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with its report: to read only."""
    folder = write_run(tmp_path_factory.mktemp("finished"))
    here = Path.cwd()
    os.chdir(folder)
    try:
        report()
    finally:
        os.chdir(here)
    return folder


@pytest.fixture(scope="session")
def html(finished: Path) -> str:
    return (finished / "artifacts" / "report" / "index.html").read_text(encoding="utf-8")


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a finished run without a report; the working directory of the test."""
    folder = write_run(tmp_path / "run")
    monkeypatch.chdir(folder)
    return folder
