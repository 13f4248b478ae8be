"""The content of dvc.yaml."""

from __future__ import annotations

from typing import Any

from ruamel.yaml import YAML

from tests.support.imports import ROOT

DAG: dict[str, Any] = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
STAGES: dict[str, Any] = DAG["stages"]


def paths(entries: list[Any]) -> set[str]:
    """The paths of a list of deps or outs, whose entries are paths or {path: options}."""
    return {next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries}
