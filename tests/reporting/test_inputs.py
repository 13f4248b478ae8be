"""Every file of the DAG is read or hashed; one that is missing or damaged is named, with the stage that makes it."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from stages.reporting.inputs import GIVEN, MADE, Project, read_run
from tests.support.dag import STAGES, paths


def read(folder: Path) -> Any:
    return read_run(Project(folder / "artifacts", folder / "data"), params={}, versions={})


def test_the_list_of_files_is_that_of_the_dag() -> None:
    written = {
        name: {path for kind in ("outs", "metrics", "plots") for path in paths(stage.get(kind, []))}
        for name, stage in STAGES.items()
        if name != "report"
    }
    assert {stage: set(names) for stage, names in MADE.items()} == written
    inputs = {dep for stage in STAGES.values() for dep in paths(stage["deps"]) if dep.startswith("data/")}
    assert {*GIVEN, "data/raw"} == {
        dep for dep in inputs if not any(dep.startswith(out) for outs in written.values() for out in outs)
    }


def test_every_file_is_hashed_under_the_stage_that_makes_it(finished: Path) -> None:
    files = read(finished).files
    adapter = (finished / "artifacts" / "adapter" / "adapters.safetensors").read_bytes()
    assert next((file.name, file.size, file.sha256) for file in files["train"]) == (
        "artifacts/adapter/adapters.safetensors",
        len(adapter),
        hashlib.sha256(adapter).hexdigest(),
    )
    assert [file.name for file in files["given"]] == ["data/raw/korean.jsonl", *GIVEN]
    assert [*files] == ["given", *MADE]


def test_a_folder_by_another_name_gives_the_same_names(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "artifacts", tmp_path / "elsewhere")
    shutil.copytree(finished / "data", tmp_path / "rows")
    assert read_run(Project(tmp_path / "elsewhere", tmp_path / "rows"), params={}, versions={}) == read(finished)


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage, names in MADE.items() for name in names])
def test_a_missing_file_names_the_stage_that_makes_it(run_folder: Path, stage: str, name: str) -> None:
    path = run_folder / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    message = f"{path}: no such file; make it with: python -m stages.{stage}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read(run_folder)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("artifacts/details/evaluate.json", b"{}", "not what evaluate writes; make it anew with: "),
        ("artifacts/details/merge.json", b"{", "merge.json:1: damaged: not JSON"),
        ("artifacts/plots/loss.csv", b"step,loss\n1,x\n", "loss.csv:2: damaged; make it anew with: "),
        ("artifacts/plots/lengths.csv", b"a\n1\n", "lengths.csv:2: damaged; make it anew with: "),
        ("artifacts/plots/loss.csv", b"\xff", "loss.csv: damaged: not UTF-8"),
        ("artifacts/samples/samples.jsonl", b"{}\n", "samples.jsonl:1: damaged: not a sample"),
        ("artifacts/samples/samples.jsonl", b"[1]\n", "samples.jsonl:1: damaged: not a sample"),
        ("artifacts/evaluate/rows.parquet", b"", "rows.parquet: damaged: not a Parquet file"),
        ("data/prepared/sources.json", b"[]", "sources.json: damaged: not a JSON object"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(run_folder: Path, name: str, content: bytes, said: str) -> None:
    (run_folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(said)) as failure:
        read(run_folder)
    assert "\n" not in str(failure.value) and "python -m stages." in str(failure.value)


def test_samples_without_an_answer_of_the_base_model_are_read(run_folder: Path) -> None:
    (run_folder / "artifacts/samples/samples.jsonl").write_text('{"prompt": "하나?", "merged": "둘"}\n')
    assert read(run_folder).samples == [{"prompt": "하나?", "merged": "둘"}]
