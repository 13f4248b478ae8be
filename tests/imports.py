"""The project's own import graph, read from the source without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent


def first_party(module: str) -> set[Path]:
    """The files of `stages` that running a module executes or may execute, itself and packages' __init__ included."""
    found: set[Path] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        for path in _files(name):
            if path not in found:
                found.add(path)
                pending += _imported(path)
    return found


def _files(name: str) -> Iterator[Path]:
    """A module's file, and the __init__.py of each package that it lies in."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ROOT.joinpath(*parts[:depth])
        if (path / "__init__.py").exists():
            yield (path / "__init__.py").relative_to(ROOT)
        elif path.with_suffix(".py").exists():
            yield path.with_suffix(".py").relative_to(ROOT)


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("stages"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stages"):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def third_party(path: Path) -> set[str]:
    """Top-level names that a file imports from outside."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).split(".")[0])
    return names
