"""The house: a file of stages/ is a command, a folder is a room; rooms lie in an order, and each knows what it may."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from stages import __main__ as commands
from tests.support.imports import MODULES, NUMERICAL, ROOT, rooms_imported, third_party

# From the top down: a room imports from rooms below it alone.
ORDER = (
    "cli", "reporting", "results", "serving", "training", "measuring", "scoring", "merging", "decoding", "formats",
    "adapters", "lora", "model", "encoding", "prompting", "questions", "tokens", "templating", "corpus", "prepared",
    "schemas", "readers", "sources", "base", "tables", "files", "params",
)  # fmt: skip
TEXT = {
    "readers", "schemas", "prepared", "corpus", "templating", "encoding", "tokens", "files", "base", "prompting",
    "questions", "reporting", "results", "tables",
}  # fmt: skip
TERMINAL = {"typer", "rich", "ruamel", "yaml", "dvc"}


def room_of(path: Path) -> str | None:
    return path.parts[1] if len(path.parts) > 2 else None


def test_a_file_is_a_command_and_a_folder_is_a_room() -> None:
    files = {path.stem for path in MODULES if room_of(path) is None} - {"__init__", "__main__"}
    names = {command.callback.__name__ for command in commands.app.registered_commands if command.callback}
    assert files == names
    assert {room_of(path) for path in MODULES} - {None} == set(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_a_room_says_what_it_is_for(room: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / "stages" / room / "__init__.py").read_text(encoding="utf-8")))
    assert text and text.splitlines()[0].endswith(".")


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(path)], ids=str)
def test_arrows_point_down(path: Path) -> None:
    own = ORDER.index(path.parts[1])
    above = {room for room in rooms_imported(path) if room not in ORDER or ORDER.index(room) <= own}
    assert above == set()


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(path)], ids=str)
def test_each_room_knows_what_it_may(path: Path) -> None:
    if path.parts[1] in NUMERICAL:
        assert not third_party(path) & TERMINAL
    if path.parts[1] in TEXT:
        assert not third_party(path) & (TERMINAL | {"mlx", "mlx_lm"})


@pytest.mark.parametrize("path", [p for p in MODULES if p.parts[1] in NUMERICAL | TEXT | {"sources"}], ids=str)
def test_rooms_print_nothing(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert "print" not in called


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(p) is None and p.stem != "doctor"], ids=str)
def test_a_command_starts_without_mlx(path: Path) -> None:
    """The rooms on MLX take a second to import: a command imports them when it runs."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    top = {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not {
        name for name in top if name.startswith("mlx") or (name.split(".")[1:2] and name.split(".")[1] in NUMERICAL)
    }


def test_nobody_imports_a_test_module() -> None:
    for path in [*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                assert not (names[0] == "tests" and any(name.startswith("test_") for name in names)), path
