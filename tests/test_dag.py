"""dvc.yaml says what the code does: paths, dependencies, parameters, and a lock that fits the committed files."""

from __future__ import annotations

import hashlib
import inspect
import shlex
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stages import params
from tests.imports import ROOT, first_party, third_party

DAG: dict[str, Any] = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
STAGES: dict[str, Any] = DAG["stages"]
# What they do shapes no output: the parameters are dependencies themselves, and messages are just shown.
NO_DEPENDENCY = {Path("stages/params.py"), Path("stages/console.py")}


def paths(entries: list[Any]) -> set[str]:
    return {next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_every_module_it_imports(name: str) -> None:
    declared = {Path(dep) for dep in paths(STAGES[name]["deps"]) if dep.endswith(".py")}
    assert declared == first_party(f"stages.{name}") - NO_DEPENDENCY


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
    tracked = {key for stage in STAGES.values() for key in stage["params"]}
    values = params.load(ROOT / "params.yaml").model_dump()
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


def test_no_output_turns_the_run_cache_off() -> None:
    # `persist` on any out, and `cache: false` on one, switch DVC's run cache off for the stage.
    assert all(isinstance(out, str) for stage in STAGES.values() for out in stage["outs"])


@pytest.mark.parametrize("path", sorted((ROOT / "stages").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_each_room_imports_only_what_it_may(path: Path) -> None:
    forbidden = {"text": {"mlx", "mlx_lm", "typer", "rich", "ruamel"}, "lora": {"typer", "rich", "ruamel", "dvc"}}
    room = path.relative_to(ROOT / "stages").parts[0]
    assert third_party(path) & forbidden.get(room, set()) == set()
    if path.parent == ROOT / "stages" and path.name != "doctor.py":
        assert "mlx" not in _imported_at_the_top(path)


def _imported_at_the_top(path: Path) -> set[str]:
    import ast

    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {
        name.split(".")[0]
        for node in nodes
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }


def test_everything_imported_is_declared() -> None:
    import sys
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    declared = {line.split(">")[0].split("[")[0].replace("-", "_").split(".")[0] for line in lines}
    imported = {name for path in ROOT.glob("stages/**/*.py") for name in third_party(path)}
    assert imported - set(sys.stdlib_module_names) - {"stages", "__future__"} <= declared


def test_the_committed_lock_fits_the_committed_files() -> None:
    lock = YAML(typ="safe").load((ROOT / "dvc.lock").read_text(encoding="utf-8"))
    tracked = set(
        subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    )
    entries = [e for stage in lock["stages"].values() for kind in ("deps", "outs") for e in stage.get(kind, [])]
    files = [entry for entry in entries if entry["path"] in tracked]
    assert len(files) > 30
    stale = {
        e["path"]
        for e in files
        if hashlib.md5((ROOT / e["path"]).read_bytes(), usedforsecurity=False).hexdigest() != e["md5"]
    }
    assert stale == set(), "run `dvc repro` and commit dvc.lock with the metrics"
    values = params.load(ROOT / "params.yaml").model_dump()
    for name, stage in lock["stages"].items():
        for key, value in stage["params"]["params.yaml"].items():
            current: Any = values
            for part in key.split("."):
                current = current[part]
            assert current == value, f"{name}: {key} changed: run `dvc repro` and commit dvc.lock"
