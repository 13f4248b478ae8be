"""Public tasks: base and merged model scored by the LM Evaluation Harness, on data of the test's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from stages.fetch import fetch
from stages.model.load import load_base
from stages.tasks import tasks
from tests.support.tiny import write_llama

TASK = """task: sums
dataset_path: json
dataset_kwargs:
  data_files: {test: %s}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
QUESTIONS: list[dict[str, Any]] = [
    {"question": f"{a} + {b} =", "choices": [f" {a + b}", f" {a * b + 1}", f" {a}{b}"], "label": 0}
    for a in range(4)
    for b in range(3)
]


@pytest.fixture
def own_task(project: Path) -> Path:
    """A folder with a task, its data beside it."""
    folder = project / "own"
    folder.mkdir()
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    (folder / "sums.yaml").write_text(TASK % data, encoding="utf-8")
    fetch()
    return folder


def accuracy(directory: Path) -> float:
    """The share of questions whose first choice is the likeliest, by a plain forward pass."""
    from transformers import AutoTokenizer

    model, tokenizer = load_base(directory)[0], AutoTokenizer.from_pretrained(directory)

    def log_probability(question: str, choice: str) -> float:
        known = len(tokenizer.encode(question))
        ids = mx.array([tokenizer.encode(question + choice)])
        log_p = nn.log_softmax(model(ids)[0, :-1], axis=-1)
        return float(mx.take_along_axis(log_p, ids[0, 1:, None], axis=-1)[known - 1 :].sum())

    right = [
        np.argmax([log_probability(row["question"], choice) for choice in row["choices"]]) == row["label"]
        for row in QUESTIONS
    ]
    return float(np.mean(right))


@pytest.mark.peers
def test_both_models_scores_are_those_of_a_plain_forward_pass(project: Path, own_task: Path, tiny_llama: Path) -> None:
    merged = write_llama(project / "merged", seed=3)
    command = [sys.executable, "-m", "stages", "tasks", "sums", "--merged", "merged", "--include", "own"]
    code = {"PYTHONPATH": str(Path(__file__).parents[1])}
    ran = subprocess.run(
        [*command, "--out", "scores.json"],
        env=os.environ | code | {"HF_HOME": str(project / "hub")},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(Path("scores.json").read_text(encoding="utf-8"))
    assert found["base"]["sums acc"]["value"] == accuracy(tiny_llama)
    assert found["merged"]["sums acc"]["value"] == accuracy(merged)
    assert 0 < found["merged"]["sums acc"]["error"] < 0.5
    assert "±" in ran.stdout


@pytest.mark.peers
def test_an_unknown_task_is_one_line(own_task: Path, tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="no task is called summs; see: lm-eval ls tasks"):
        tasks(["summs"], merged=tiny_llama, include=own_task)


def test_without_the_library_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        ValueError, match=r"tasks needs the lm-eval library; install it with: pip install '\.\[tasks\]'"
    ):
        tasks(["sums"])
