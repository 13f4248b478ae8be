"""The room text/ knows nothing of the model, the terminal or the parameters' file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.imports import ROOT, first_party, third_party

MODULES = sorted((ROOT / "stages" / "text").glob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_text_imports_neither_mlx_nor_the_command_line(path: Path) -> None:
    for part in first_party(f"stages.text.{path.stem}" if path.stem != "__init__" else "stages.text"):
        assert not third_party(ROOT / part) & {"mlx", "mlx_lm", "typer", "rich", "yaml", "ruamel", "dvc"}
