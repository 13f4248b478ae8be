"""The installed versions of the libraries that shape an output, beside those that versions.yaml names."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from ruamel.yaml import YAML

VERSIONS_FILE = Path("versions.yaml")


def read_versions(path: Path = VERSIONS_FILE) -> dict[str, str]:
    """The file's versions by library; none if there is no such file."""
    if not path.exists():
        return {}
    content = YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {}
    return {name: str(version) for name, version in content.items()}


def differing_versions(path: Path = VERSIONS_FILE) -> dict[str, tuple[str, str]]:
    """Compare installed versions with the file's: library → (installed, in the file) for those that differ."""
    differing = {}
    for name, version in read_versions(path).items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # another system's: OpenBLAS on a Mac, say
        if installed != version:
            differing[name] = (installed, version)
    return differing


def describe_difference(path: Path = VERSIONS_FILE) -> str | None:
    """Say in one line which versions differ, and what to do; None if none does."""
    differing = differing_versions(path)
    if not differing:
        return None
    listed = ", ".join(f"{name} {installed} (not {named})" for name, (installed, named) in differing.items())
    return (
        f"installed is {listed}: other versions than {path} tells DVC, so the bytes may differ; "
        "install those of constraints.txt, or make these the project's: make constraints"
    )
