"""The result at a glance, and files that are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.show import show

SCORES = {"rows": 4, "rows_improved": 3, "base": {"loss": 2.0}, "adapter": {"loss": 1.5}}
SAMPLE = {"prompt": "2 + 2?", "base": "5", "merged": "4"}


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "evaluate.json"
    path.write_text(json.dumps(SCORES))
    return path


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(SAMPLE) + "\n")
    return path


def test_scores_and_samples_are_shown(metrics: Path, samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(metrics, samples, 1)
    shown = capsys.readouterr().out
    assert "Held-out rows: 4, of which the adapter predicts 3 better" in shown
    assert "2.0000" in shown and "1.5000" in shown and "2 + 2?" in shown


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "evaluate.json:1: damaged: not JSON"),
        (b"{\n{", "evaluate.json:2: damaged: not JSON"),
        (b"\xff\xfe", "evaluate.json: damaged: not JSON in UTF-8"),
        (b"[1]", "evaluate.json: damaged: not a JSON object"),
        (b"{}", "evaluate.json: not what evaluate writes"),
        (b'{"rows": "x", "rows_improved": 1, "base": {}}', "evaluate.json: not what evaluate writes"),
        (b'{"rows": 1, "rows_improved": 1, "base": {"loss": 1}, "adapter": {}}', "evaluate.json: not what evaluate"),
        (b'{"rows": 1, "rows_improved": 1, "base": [], "adapter": {}}', "evaluate.json: not what evaluate writes"),
    ],
)
def test_damaged_metrics_are_named(metrics: Path, samples: Path, content: bytes, said: str) -> None:
    metrics.write_bytes(content)
    with pytest.raises(ValueError, match=r"; make it with: dvc repro$") as failure:
        show(metrics, samples, 1)
    assert said in str(failure.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "x"}\n{"prompt"', "samples.jsonl:2: damaged: not JSON"),
        (b"[1]", "samples.jsonl:1: not a sample that generate writes"),
        (b'{"prompt": 3}', "samples.jsonl:1: not a sample that generate writes"),
        (b"\xff\xfe", "samples.jsonl: damaged: not UTF-8"),
    ],
)
def test_damaged_samples_are_named_with_their_line(metrics: Path, samples: Path, content: bytes, said: str) -> None:
    samples.write_bytes(content)
    with pytest.raises(ValueError, match=r"; make it with: dvc repro$") as failure:
        show(metrics, samples, 1)
    assert said in str(failure.value)


@pytest.mark.parametrize("name", ["evaluate.json", "samples.jsonl"])
def test_a_missing_file_is_named(metrics: Path, samples: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}: no such file; make it with: dvc repro"):
        show(metrics, samples, 1)
