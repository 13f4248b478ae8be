"""The commands as a user types them: help, one-line errors, exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from stages import __main__ as commands
from tests.support.imports import ROOT

NAMES = ("fetch", "prepare", "tokenize", "train", "evaluate", "merge", "generate")


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("stages.train", "--set", "lora.rnak=8"), "error: --set lora.rnak=8: unknown key; did you mean 'rank'?"),
        (
            ("stages.train", "--set", "train.learning_rate=fast"),
            "error: --set train.learning_rate=fast: must be a valid number, not 'fast'",
        ),
        (("stages", "prepare", "nowhere"), "error: nowhere: no such file or folder; put your rows there as .jsonl"),
        (
            ("stages.prepare", "--params", "nowhere.yaml"),
            "error: nowhere.yaml: no such file; run in the project's folder",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_1(arguments: tuple[str, ...], line: str) -> None:
    done = command(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(line)
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.parametrize("name", NAMES)
def test_help_tells_what_the_stage_reads_and_writes(name: str) -> None:
    done = command(f"stages.{name}", "--help")
    assert done.returncode == 0
    assert "--out" in done.stdout and "--set" in done.stdout and "--params" in done.stdout


def test_the_overview_lists_every_command() -> None:
    done = command("stages", "--help")
    assert all(f" {name} " in done.stdout for name in (*NAMES, "show", "doctor"))


def test_the_manifest_has_one_name_in_all_commands() -> None:
    group = typer.main.get_command(commands.app)
    found = {
        name: option.opts
        for name, command in group.commands.items()  # type: ignore[attr-defined]
        for option in command.params
        if getattr(option, "help", None) == "The base model's manifest."
    }
    assert {"train", "evaluate", "merge", "convert", "tasks", "generate", "chat", "serve"} <= found.keys()
    assert {name for name, names in found.items() if names[0] != "--manifest"} == set()


def test_the_overview_imports_nothing_heavy() -> None:
    code = "import sys, stages.__main__; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"mlx", "mlx_lm", "transformers", "tokenizers", "pyarrow", "huggingface_hub"}
    assert heavy & set(done.stdout.split()) == set()


def test_a_folder_that_cannot_be_written_is_one_line(project: Path) -> None:
    (project / "data" / "prepared").write_text("in the way")
    (project / "blocked").write_text("")
    done = command("stages.prepare", "--out", "blocked/prepared", cwd=project)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: blocked: File exists"]


def test_doctor_tells_blas_memory_dvc_and_git(project: Path) -> None:
    done = command("stages", "doctor", cwd=project)
    assert done.returncode == 0, done.stderr
    for word in ("mlx", "BLAS", "GFLOP/s", "memory", "DVC", "git", "store"):
        assert word in done.stdout


def test_nothing_half_written_after_a_failure(project: Path) -> None:
    raw = project / "data" / "raw" / "rows.jsonl"
    raw.write_text(raw.read_text(encoding="utf-8") + "{broken\n", encoding="utf-8")
    done = command("stages.prepare", cwd=project)
    assert done.returncode == 1
    assert done.stderr.startswith("error: data/raw/rows.jsonl:41: not valid JSON")
    assert sorted(path.name for path in (project / "data").iterdir()) == ["general.jsonl", "prompts.jsonl", "raw"]
