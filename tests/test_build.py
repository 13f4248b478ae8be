"""Tests of the project's own build: requirements and their pins."""

from __future__ import annotations

import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.imports import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins() -> dict[str, set[str]]:
    """The versions of constraints.txt by library."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    found: dict[str, set[str]] = {}
    for pin in map(Requirement, lines):
        found.setdefault(canonicalize_name(pin.name), set()).update(each.version for each in pin.specifier)
    return found


def test_every_requirement_is_pinned_to_a_version_that_it_allows() -> None:
    extras = [requirement for requirements in PROJECT["optional-dependencies"].values() for requirement in requirements]
    required = [Requirement(text) for text in (*PROJECT["dependencies"], *extras)]
    pinned = pins()
    others = [requirement for requirement in required if requirement.name != PROJECT["name"]]
    assert len(others) > 20
    for requirement in others:
        versions = pinned[canonicalize_name(requirement.name)]
        assert versions and all(requirement.specifier.contains(version) for version in versions), requirement
