"""The DAG under DVC, on a tiny model: what reruns, what does not, what the documentation says of it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stages.lora import code
from tests.support.dag import DAG, STAGES, paths
from tests.support.dvc_project import adapter, commit, dvc, environment, git, make_project, python, ran
from tests.support.imports import MODULES, ROOT

LOOKS = ["fetch"]  # what runs each time, to see whether the base model is what it was


def downstream(first: set[str]) -> set[str]:
    """The stages that rerun when the `first` ones do and write something else."""
    ran = set(first)
    for name, stage in STAGES.items():  # in the DAG's order
        made = {out for other in ran for out in paths(STAGES[other]["outs"])}
        if any(dep == out or dep.startswith(f"{out}/") for dep in paths(stage["deps"]) for out in made):
            ran.add(name)
    return ran


def reruns(parameter: str) -> set[str]:
    sections = {parameter, parameter.split(".")[0]}
    return downstream({name for name, stage in STAGES.items() if sections & parameters(stage)})


def parameters(stage: Any) -> set[str]:
    """The keys and sections of params.yaml that a stage tracks."""
    return {entry for entry in stage["params"] if isinstance(entry, str)}


def test_the_documentation_tells_what_a_parameter_reruns() -> None:
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    text = text.split("| parameter | stages that run |")[1].split("\n\n")[0]
    table = re.findall(r"^\| (`[^|]+`) \| ([a-z, ]+) \|$", text, flags=re.MULTILINE)
    assert len(table) >= 8
    for cell, stages in table:
        for parameter in re.findall(r"`([^`]+)`", cell):
            assert reruns(parameter) == set(stages.split(", ")), parameter
    documented = {p for cell, _ in table for p in re.findall(r"`([^`]+)`", cell)}
    tracked = {key for stage in STAGES.values() for key in parameters(stage)}
    assert tracked <= documented | {p.split(".")[0] for p in documented}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The project as a DVC repository of its own, reproduced once."""
    folder = make_project(tmp_path_factory.mktemp("dvc") / "project", str(tiny_llama))
    assert ran(dvc(folder, "repro")) == list(STAGES)
    commit(folder, "reproduced")
    return folder


def test_a_second_repro_runs_nothing_and_changes_nothing(repository: Path) -> None:
    assert ran(dvc(repository, "repro")) == LOOKS
    assert git(repository, "status", "--porcelain") == ""


def stale(folder: Path) -> set[str]:
    """The stages with a changed dependency, as DVC sees them."""
    from dvc.repo import Repo

    with Repo(str(folder)) as repo:
        status: dict[str, Any] = repo.status()
    return {
        stage for stage, changes in status.items() if any(isinstance(c, dict) and "changed deps" in c for c in changes)
    }


def test_a_change_in_a_module_makes_just_the_stages_stale_that_run_it(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    runs = {stage: code.code_files(f"stages.{stage}") for stage in STAGES}
    assert stale(repository) == set()
    for module in MODULES:
        path = repository / module
        before = path.read_bytes()
        path.write_bytes(before + b"# changed\n")
        assert stale(repository) == {stage for stage, files in runs.items() if module in files}, module
        path.write_bytes(before)


@pytest.mark.parametrize("library", code.VERSIONED)
def test_another_version_of_a_library_makes_just_the_stages_stale_that_use_it(
    repository: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.chdir(repository)
    path = repository / "versions.yaml"
    before = path.read_text(encoding="utf-8")
    path.write_text(re.sub(rf"^{library}: .*", f"{library}: 99.0", before, flags=re.MULTILINE), encoding="utf-8")
    assert stale(repository) == {stage for stage in STAGES if library in code.versions_used(f"stages.{stage}")}
    path.write_text(before, encoding="utf-8")


def test_an_experiment_reruns_just_what_depends_on_the_parameter(repository: Path) -> None:
    output = dvc(repository, "exp", "run", "-S", "train.learning_rate=0.05")
    expected = {"train", "merge", "evaluate", "generate", "report"}  # the baseline is there
    assert set(ran(output)) - set(LOOKS) == reruns("train.learning_rate") == expected
    difference = dvc(repository, "metrics", "diff", "--json")
    assert "valid_loss" in difference and "trained_tokens" not in difference
    # The same numbers again come from the run cache.
    git(repository, "checkout", "--quiet", ".")
    assert ran(dvc(repository, "repro")) == LOOKS
    dvc(repository, "checkout")


def test_a_changed_output_of_no_consequence_stops_there(repository: Path) -> None:
    # Reports change the curves, not the adapter: of what is downstream only the page that shows them runs.
    assert ran(dvc(repository, "repro", "--dry")) == LOOKS
    output = dvc(repository, "exp", "run", "-S", "train.steps_per_report=1")
    assert ran(output) == [*LOOKS, "train", "report"]
    git(repository, "checkout", "--quiet", ".")
    dvc(repository, "checkout")


def test_dvc_shows_dag_metrics_and_parameters(repository: Path) -> None:
    assert all(name in dvc(repository, "dag") for name in STAGES)
    assert "evaluate.json" in dvc(repository, "metrics", "show")
    dvc(repository, "params", "diff")
    dvc(repository, "plots", "show", "--json")


def test_the_adapter_is_a_declared_artifact(repository: Path) -> None:
    artifact: Any = DAG["artifacts"]["adapter"]
    assert (repository / artifact["path"] / "adapters.safetensors").exists()


def checkpoint(folder: Path, process: subprocess.Popen[bytes]) -> Path:
    """The first checkpoint that a DVC command's training writes."""
    deadline = time.monotonic() + 120
    while not (found := sorted(folder.glob("artifacts/checkpoints/*/step-*"))):
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.02)
    return found[0]


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A DVC command in a session of its own, so that it can be killed with its children."""
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.fixture
def clone(repository: Path, tmp_path: Path) -> Path:
    """A clone with a run of its own ahead: long enough to be killed in."""
    folder = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(repository), str(folder)], check=True, env=environment(repository))
    shutil.copytree(repository.parent / "store", tmp_path / "store", dirs_exist_ok=True)
    text = (folder / "params.yaml").read_text(encoding="utf-8")
    text = re.sub(r"iters: 6\b", "iters: 150", text)
    (folder / "params.yaml").write_text(re.sub(r"steps_per_save: \d+", "steps_per_save: 5", text), encoding="utf-8")
    git(folder, "commit", "--quiet", "--all", "--message", "longer")
    return folder


def test_a_killed_repro_ends_in_the_bytes_of_an_undisturbed_one(clone: Path) -> None:
    process = start(clone, "repro")
    checkpoint(clone, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (clone / "artifacts" / "adapter" / "adapters.safetensors").exists()
    assert "going on after step" in dvc(clone, "repro")
    resumed = adapter(clone)
    dvc(clone, "repro", "--force", "--single-item", "--no-run-cache", "train")
    assert adapter(clone) == resumed


def ended(folder: Path, name: str) -> None:
    """Wait for a queued experiment: `--run-all` follows its log, and returns if that is not there yet."""
    deadline = time.monotonic() + 120
    while not re.search(rf"\b{name}\b.*\b(Success|Failed)\b", status := dvc(folder, "queue", "status")):
        assert time.monotonic() < deadline, status
    assert re.search(rf"\b{name}\b.*\bSuccess\b", status), status + dvc(folder, "queue", "logs", name)


def test_a_killed_queued_experiment_ends_in_the_bytes_of_an_undisturbed_one(clone: Path) -> None:
    dvc(clone, "repro", "tokenize")
    dvc(clone, "exp", "run", "--queue", "--name", "first", "-S", "train.learning_rate=0.02")
    process = start(clone, "exp", "run", "--run-all")
    found = checkpoint(clone, process)
    os.kill(int((found.parent / "lock").read_text()), signal.SIGKILL)
    process.wait(timeout=60)
    dvc(clone, "exp", "run", "--queue", "--name", "second", "-S", "train.learning_rate=0.02")
    dvc(clone, "exp", "run", "--run-all")
    ended(clone, "second")
    assert "going on after step" in dvc(clone, "queue", "logs", "second")
    dvc(clone, "exp", "apply", "second")
    resumed = adapter(clone)
    dvc(clone, "repro", "--force", "--single-item", "--no-run-cache", "train")
    assert adapter(clone) == resumed


@pytest.fixture(scope="module")
def experiments(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with an experiment that trains hardly at all, and one on other rows."""
    folder = tmp_path_factory.mktemp("experiments") / "project"
    subprocess.run(["git", "clone", "--quiet", str(repository), str(folder)], check=True, env=environment(repository))
    shutil.copytree(repository.parent / "store", folder.parent / "store", dirs_exist_ok=True)
    dvc(folder, "repro")
    dvc(folder, "exp", "run", "--name", "slower", "-S", "train.learning_rate=1e-9")
    git(folder, "checkout", "--quiet", ".")
    dvc(folder, "checkout")
    return folder


def test_compare_tells_whether_an_experiment_is_better(experiments: Path) -> None:
    said = python(experiments, "stages.compare", "slower")
    assert re.search(r"slower against HEAD: worse on \d+ of \d+ rows; loss \+0", said)
    assert "train.learning_rate" in said and "1e-09" in said and "Most worse" in said
    assert re.search(r"HEAD against slower: better on", python(experiments, "stages.compare", "slower", "HEAD"))


def test_compare_of_a_clean_workspace_finds_no_difference(experiments: Path) -> None:
    said = python(experiments, "stages.compare")
    assert "workspace against HEAD: within noise: better on 0 of" in said
    assert "The same parameters, versions, base model and data." in said


def test_several_are_ranked_with_wider_intervals(experiments: Path) -> None:
    said = python(experiments, "stages.compare", "HEAD", "slower", "workspace")
    assert "intervals of 97.50%, for 2 comparisons" in said
    assert said.index("workspace") < said.index("slower")
    assert "slower" in python(experiments, "stages.compare", "--experiments")


def test_compare_names_what_is_not_there(experiments: Path, tmp_path: Path) -> None:
    assert "error: nothing: no such experiment, branch, tag or commit" in python(
        experiments, "stages.compare", "nothing", status=1
    )
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(experiments), str(clone)], check=True, env=environment(experiments))
    said = python(clone, "stages.compare", status=1)
    assert "error: artifacts/evaluate/rows.parquet of HEAD is not here; " in said and "dvc pull" in said


def test_the_metrics_fit_a_terminal_of_120_columns(experiments: Path) -> None:
    for command in (("metrics", "show"), ("metrics", "diff", "--all")):
        assert max(map(len, dvc(experiments, *command).splitlines())) <= 120, command
