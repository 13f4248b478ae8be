"""dvc.yaml says what the code does: paths, dependencies, parameters, and a lock that fits the committed files."""

from __future__ import annotations

import inspect
import json
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.lora import code
from stages.params.loading import load_params
from tests.support.dag import STAGES, paths
from tests.support.imports import MODULES, ROOT, third_party


def declared(name: str) -> set[str]:
    """The code that a stage depends on: its files and rooms."""
    return {dep for dep in paths(STAGES[name]["deps"]) if dep.startswith("stages/")}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_the_code_that_it_runs_and_no_other(name: str) -> None:
    files = code.code_files(f"stages.{name}")
    assert declared(name) == {str(path) if len(path.parts) == 2 else f"stages/{path.parts[1]}" for path in files}
    # Exact: a room holds no module that the stage does without.
    there = {path for path in MODULES if path.parts[1] in {room.split("/")[1] for room in declared(name)}}
    assert there == files


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_the_versions_that_it_computes_with(name: str) -> None:
    tracked = next(entry["versions.yaml"] for entry in STAGES[name]["params"] if isinstance(entry, dict))
    assert set(tracked) == code.versions_used(f"stages.{name}")


def test_the_tracked_versions_are_those_of_the_constraints() -> None:
    tracked = YAML(typ="safe").load((ROOT / "versions.yaml").read_text(encoding="utf-8"))
    pinned = dict(
        line.split(" ")[0].split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert set(tracked) == set(code.VERSIONED)
    assert {name: pinned[name] for name in tracked} == {name: str(version) for name, version in tracked.items()}


@pytest.mark.parametrize("name", STAGES)
def test_the_command_runs_with_the_defaults_of_its_function(name: str) -> None:
    python, minus_m, module, *arguments = shlex.split(STAGES[name]["cmd"])
    assert (python, minus_m, module) == ("python", "-m", f"stages.{name}")
    defaults = inspect.signature(getattr(import_module(module), name)).parameters
    *inputs, option, out = arguments
    assert option == "--out"
    assert str(defaults["out"].default) == out
    if inputs:
        first = next(iter(defaults.values()))
        # A list's default is in the function's body, and in its help.
        assert inputs == [str(first.default)] or f"[default: {inputs[0]}]" in str(first.annotation)


@pytest.mark.parametrize("name", STAGES)
def test_every_path_option_is_a_dependency_or_an_output(name: str) -> None:
    stage = STAGES[name]
    known = (
        paths(stage["deps"]) | paths(stage["outs"]) | paths(stage.get("metrics", [])) | paths(stage.get("plots", []))
    )
    function = getattr(import_module(f"stages.{name}"), name)
    for option in inspect.signature(function).parameters.values():
        if isinstance(option.default, Path) and option.name not in ("params_file", "timing"):
            default = str(option.default)
            assert any(path == default or path.startswith(f"{default}/") for path in known), option.name


def test_every_parameter_but_the_runtime_ones_belongs_to_a_stage() -> None:
    tracked = {key for stage in STAGES.values() for key in stage["params"] if isinstance(key, str)}
    values = load_params(ROOT / "params.yaml").model_dump()
    keys = {f"{section}.{key}" for section, part in values.items() if isinstance(part, dict) for key in part}
    keys |= {key for key, part in values.items() if not isinstance(part, dict)}
    untracked = {key for key in keys if key not in tracked and key.split(".")[0] not in tracked}
    assert untracked == {key for key in keys if key.startswith("runtime.")}


def test_what_varies_from_run_to_run_is_no_output() -> None:
    outputs = {
        path
        for stage in STAGES.values()
        for kind in ("outs", "metrics", "plots")
        for path in paths(stage.get(kind, []))
    }
    assert not any(path.startswith("artifacts/timing") for path in outputs)


def test_no_output_turns_the_run_cache_off_but_the_base_models() -> None:
    # `persist` on any out, and `cache: false` on one, switch DVC's run cache off for the stage. Fetch's real input lies
    # outside of DVC, and the run cache would bring an old base model back.
    assert {name for name, stage in STAGES.items() if not all(isinstance(out, str) for out in stage["outs"])} == {
        "fetch"
    }


def test_everything_imported_is_declared() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    modules = {package: module for module, package in code.IMPORTED_AS.items()}
    packages = [line.split(">")[0].split("[")[0] for line in lines]
    declared = {modules.get(name, name.replace("-", "_").split(".")[0]) for name in packages}
    imported = {name for path in MODULES for name in third_party(path)}
    assert imported - set(sys.stdlib_module_names) - {"stages", "__future__"} <= declared


def test_the_committed_lock_fits_the_committed_files() -> None:
    # Outputs are not there in a fresh clone, and this is no concern of this test.
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--json"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    # Fetch looks each time, and says so here.
    changes = [change for stage in json.loads(done.stdout).values() for change in stage if change != "always changed"]
    assert not any(isinstance(change, str) for change in changes), "a command changed: run `dvc repro`"
    stale = {
        f"{path}: {inner}"
        for change in changes
        for path, state in change.get("changed deps", {}).items()
        for inner in (state if isinstance(state, dict) else [state])
        if state != "deleted"
    }
    assert stale == set(), "run `dvc repro` and commit dvc.lock with the metrics"
