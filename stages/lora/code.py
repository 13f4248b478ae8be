"""The code that a module runs, read from its source: its own files, and the versions of the libraries it imports.

The one list of code: the names of checkpoints and of the frozen layers' cache are made from it, and a test holds the
`deps` and the versions in dvc.yaml against it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stages.files.hashes import sha256
from stages.model.blas import installed_version

ROOT = Path(__file__).parents[2]
# The libraries whose versions shape an output. The same names are in versions.yaml, which DVC tracks.
VERSIONED = (
    "jinja2", "mlx", "mlx-lm", "numpy", "pyarrow", "rapidfuzz", "sacrebleu", "safetensors", "scipy", "scipy-openblas32",
    "sqlglot", "tokenizers", "transformers", "vl-convert-python",
)  # fmt: skip
IMPORTED_AS = {"vl_convert": "vl-convert-python"}  # where a package's module has another name
# Rooms that shape no output: params/ reads values that are dependencies themselves, cli/ and serving/ talk to users.
NO_DEPENDENCY = ("stages/cli/", "stages/params/", "stages/serving/")


def code_files(module: str) -> set[Path]:
    """The files of this project that running a module may execute and that may shape its output, from the root.

    A package's `__init__.py` counts as soon as anything in the package is imported. Imports for types alone do not.
    """
    found: set[Path] = set()
    pending = [module]
    while pending:
        for path in _files(pending.pop()):
            if path not in found and not str(path).startswith(NO_DEPENDENCY):
                found.add(path)
                pending += imported(ROOT / path, "stages")
    return found


def versions_used(module: str) -> set[str]:
    """Those of `VERSIONED` that a module's code imports."""
    names = {name.split(".")[0] for path in code_files(module) for name in imported(ROOT / path)}
    return {IMPORTED_AS.get(name, name.replace("_", "-")) for name in names} & set(VERSIONED)


def fingerprint(*modules: str) -> dict[str, Any]:
    """Digests of modules' files and the installed versions of their libraries: with others, results may be others."""
    files = sorted({path for module in modules for path in code_files(module)})
    versions = sorted({name for module in modules for name in versions_used(module)})
    return {
        "code": {str(path): sha256(ROOT / path) for path in files},
        "versions": {name: installed_version(name) for name in versions},
    }


def imported(path: Path, package: str = "", *, types: bool = False) -> set[str]:
    """Dotted names that a file imports, wherever in it; with a `package`, its own alone; with `types`, for them too."""
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if types else _nodes(tree.body):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            # What is named after `import` may be a module too.
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if not package or name.split(".")[0] == package}


def _nodes(statements: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All nodes below, but for those under `if TYPE_CHECKING:`."""
    for node in statements:
        yield node
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            yield from _nodes(node.orelse)
        else:
            yield from _nodes(ast.iter_child_nodes(node))


def _files(name: str) -> Iterator[Path]:
    """A module's file, and the `__init__.py` of each package that it lies in."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ROOT.joinpath(*parts[:depth])
        if (path / "__init__.py").exists():
            yield (path / "__init__.py").relative_to(ROOT)
        elif path.with_suffix(".py").exists():
            yield path.with_suffix(".py").relative_to(ROOT)
