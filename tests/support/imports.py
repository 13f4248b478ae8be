"""The project's modules and their imports."""

from __future__ import annotations

from pathlib import Path

from stages.lora import code

ROOT = Path(__file__).parents[2]
MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "stages").rglob("*.py"))

# The rooms that compute with MLX.
NUMERICAL = {
    "model", "lora", "measuring", "scoring", "training", "merging", "decoding", "adapters", "formats", "serving",
}  # fmt: skip


def third_party(path: Path) -> set[str]:
    """Top-level names that a file imports from other projects, also those for types alone."""
    return {name.split(".")[0] for name in code.imported(ROOT / path, types=True)} - {"stages", "__future__"}


def rooms_imported(path: Path) -> set[str]:
    """The other rooms that a file of a room imports from, also for types alone."""
    named = [name.split(".") for name in code.imported(ROOT / path, "stages", types=True)]
    return {parts[1] for parts in named if len(parts) > 1} - {path.parts[1]}
