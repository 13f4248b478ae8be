"""The base model under DVC: `dvc repro` is right by itself when a branch moves or a local directory changes."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.dvc_project import adapter, commit, dvc, environment, git, make_project, python, ran
from tests.support.fake_hub import FakeHub
from tests.support.tiny import write_llama

WEIGHTS = "model.safetensors"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def revision(folder: Path) -> str:
    return str(json.loads((folder / "artifacts" / "base.json").read_text(encoding="utf-8"))["revision"])


def revision_of_experiment(folder: Path, name: str) -> str:
    (ref,) = git(folder, "for-each-ref", "--format=%(refname)", f"refs/exps/**/{name}").split()
    return str(json.loads(git(folder, "show", f"{ref}:artifacts/base.json"))["revision"])


def clone_of(project: Path, folder: Path) -> Path:
    """A clone without any output; the store beside it is its own until it is given one."""
    folder.parent.mkdir(exist_ok=True)
    subprocess.run(["git", "clone", "--quiet", str(project), str(folder)], check=True, env=environment(project))
    return folder


# --- a branch of the Hub ---


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models that differ in their weights."""
    return [write_llama(tmp_path_factory.mktemp("bases") / str(seed), seed=seed) for seed in (1, 2)]


@pytest.fixture
def hub(tmp_path: Path, bases: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub with `org/name`, whose main branch is the first model; the processes of a test know no other."""
    server = FakeHub()
    server.repository("org/name").commit(files_of(bases[0]))
    settings = {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.stop()


def test_a_moved_branch_is_followed_when_asked_and_an_old_commit_keeps_its_base(
    tmp_path: Path, hub: FakeHub, bases: list[Path]
) -> None:
    project = make_project(tmp_path / "machine" / "project", "org/name")
    first = hub.repository("org/name").refs["main"]
    dvc(project, "repro", "train")
    old = commit(project, "first base")
    before = adapter(project)

    second = hub.repository("org/name").commit(files_of(bases[1]))
    hub.requests.clear()
    assert ran(dvc(project, "repro", "train")) == ["fetch"]  # nobody asked where the branch is
    assert hub.requests == []

    moved = f"the base model moved: org/name from {first} to {second}"
    assert moved in python(project, "stages.fetch", "--refresh")
    assert ran(dvc(project, "repro", "train")) == ["fetch", "tokenize", "train"]
    assert revision(project) == second
    commit(project, "second base")
    after = adapter(project)
    assert after != before

    git(project, "checkout", "--quiet", old)
    hub.requests.clear()
    assert ran(dvc(project, "repro", "train")) == ["fetch"]  # the rest is in DVC's cache
    assert (revision(project), adapter(project)) == (first, before)
    assert git(project, "status", "--porcelain") == ""
    git(project, "checkout", "--quiet", "-")
    dvc(project, "checkout", "--with-deps", "train")
    assert (revision(project), adapter(project)) == (second, after)
    assert ran(dvc(project, "repro", "train")) == ["fetch"]
    assert hub.requests == []


def test_a_refreshed_base_goes_into_experiments_and_clones(tmp_path: Path, hub: FakeHub, bases: list[Path]) -> None:
    project = make_project(tmp_path / "machine" / "project", "org/name")
    first = hub.repository("org/name").refs["main"]
    dvc(project, "repro", "tokenize")
    old = commit(project, "first base")
    second = hub.repository("org/name").commit(files_of(bases[1]))
    python(project, "stages.fetch", "--refresh")
    # Not committed yet: an experiment in a folder of its own takes it along.
    output = dvc(project, "exp", "run", "--temp", "--name", "apart", "-S", "tokenize.max_length=300", "tokenize")
    assert ran(output) == ["fetch", "tokenize"]
    assert revision_of_experiment(project, "apart") == second
    assert ran(dvc(project, "exp", "run", "-S", "tokenize.max_length=301", "tokenize")) == ["fetch", "tokenize"]
    commit(project, "second base")

    # Another clone on this machine needs no Hub, at either commit; another machine asks for the commit's own revision.
    neighbour = clone_of(project, project.with_name("neighbour"))
    hub.requests.clear()
    dvc(neighbour, "repro", "fetch")
    assert revision(neighbour) == second
    git(neighbour, "checkout", "--quiet", old)
    dvc(neighbour, "repro", "fetch")
    assert (revision(neighbour), hub.requests) == (first, [])
    shutil.rmtree(tmp_path / "hf")
    stranger = clone_of(project, tmp_path / "another machine" / "project")
    git(stranger, "checkout", "--quiet", old)
    dvc(stranger, "repro", "tokenize")
    assert revision(stranger) == first
    assert git(stranger, "status", "--porcelain") == ""


# --- a local directory ---


@pytest.fixture
def directory(tmp_path: Path, bases: list[Path]) -> Path:
    return Path(shutil.copytree(bases[0], tmp_path / "my model"))


def replace_weights(directory: Path, bases: list[Path], index: int) -> None:
    """Write another model's weights into the file, which keeps its place and length."""
    (directory / WEIGHTS).write_bytes((bases[index] / WEIGHTS).read_bytes())


def test_a_changed_directory_is_taken_as_it_is_now(tmp_path: Path, directory: Path, bases: list[Path]) -> None:
    project = make_project(tmp_path / "machine" / "project", str(directory))
    dvc(project, "repro", "tokenize")
    old = commit(project, "first base")
    first = revision(project)
    assert ran(dvc(project, "repro", "tokenize")) == ["fetch"]

    replace_weights(directory, bases, 1)
    output = dvc(project, "repro", "tokenize")
    changed = f"the base model changed: {WEIGHTS} in {directory} differs from base.json; it is taken as it is now"
    assert changed in output
    assert ran(output) == ["fetch", "tokenize"]
    second = revision(project)
    assert second != first
    commit(project, "second base")

    # An old commit's base cannot be had back: a stage alone refuses, with the way on; `dvc repro` goes on and says so.
    git(project, "checkout", "--quiet", old)
    dvc(project, "checkout", "--with-deps", "tokenize")
    refused = python(project, "stages.tokenize", status=1)
    assert f"{directory / WEIGHTS} differs from the base model in base.json (sha256 " in refused
    assert "cannot be had back here" in refused and "run: dvc repro" in refused
    output = dvc(project, "repro", "tokenize")
    assert changed in output
    assert revision(project) == second
    assert ran(dvc(project, "repro", "tokenize")) == ["fetch"]
    git(project, "checkout", "--quiet", ".")

    # Put back, it is the old one again, from DVC's cache.
    replace_weights(directory, bases, 0)
    assert ran(dvc(project, "repro", "tokenize")) == ["fetch"]
    assert git(project, "status", "--porcelain") == ""


def test_a_changed_directory_goes_into_experiments_and_clones(
    tmp_path: Path, directory: Path, bases: list[Path]
) -> None:
    project = make_project(tmp_path / "machine" / "project", str(directory))
    dvc(project, "repro", "tokenize")
    commit(project, "first base")
    neighbour = clone_of(project, project.with_name("neighbour"))
    replace_weights(directory, bases, 1)
    for arguments in (["--temp", "--name", "apart"], []):
        output = dvc(project, "exp", "run", *arguments, "-S", f"tokenize.max_length={300 + len(arguments)}", "tokenize")
        assert f"the base model changed: {WEIGHTS}" in output
        assert ran(output) == ["fetch", "tokenize"]
    assert revision_of_experiment(project, "apart") == revision(project)
    assert f"the base model changed: {WEIGHTS}" in dvc(neighbour, "repro", "fetch")
    assert revision(neighbour) == revision(project)


def test_a_directory_in_the_project_is_found_by_an_experiment_apart(tmp_path: Path, directory: Path) -> None:
    project = make_project(tmp_path / "machine" / "project", "./base")
    (project / ".git" / "info" / "exclude").write_text("/base\n", encoding="utf-8")
    shutil.copytree(directory, project / "base")
    commit(project, "not reproduced")
    output = dvc(project, "exp", "run", "--temp", "--name", "apart", "tokenize")
    assert set(ran(output)) == {"fetch", "prepare", "tokenize"}


# --- a bad parameter ---


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_bad_parameter_costs_no_output(tmp_path: Path, directory: Path) -> None:
    project = make_project(tmp_path / "machine" / "project", str(directory))
    dvc(project, "repro", "tokenize")
    commit(project, "reproduced")
    made = files_below(project / "data")
    # Fetch runs first, and reads all parameters.
    refused = dvc(project, "exp", "run", "-S", "prepare.max_chars=-5", "-S", "tokenize.max_length=-5", status=255)
    assert "prepare.max_chars: must be greater than or equal to 1" in refused
    assert files_below(project / "data") == made
    # Alone, the stage has lost its outputs by the time that it reads them.
    refused = dvc(project, "repro", "--single-item", "tokenize", status=255)
    assert "outputs that DVC removed before this stage ran come back with: dvc checkout" in refused
    assert not (project / "data" / "tokens").exists()
    git(project, "checkout", "--quiet", ".")
    dvc(project, "checkout", "--with-deps", "tokenize")
    assert files_below(project / "data") == made
