"""The table of formats, and an adapter written in one of them and proven."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stages.adapters import find
from stages.formats import mlx, npz, peft
from stages.formats.base import Base
from stages.formats.proof import Proof, compare
from stages.lora.adapter_files import Saved


@dataclass(frozen=True)
class Format:
    """How an adapter is written, and the files that this makes."""

    write: Callable[[Path, Saved, Base], None]
    files: tuple[str, ...]


FORMATS = {
    "mlx": Format(mlx.write, ("adapters.safetensors", "adapter_config.json")),
    "peft": Format(peft.write, ("adapter_model.safetensors", "adapter_config.json")),
    "npz": Format(npz.write, ("adapters.npz",)),
}


def export(saved: Saved, directory: Path, to: str, base: Base) -> Proof:
    """Write the adapter into a folder and read it back.

    Raises:
        ValueError: the format has no exact form for it, or what is read back is another adapter.
    """
    FORMATS[to].write(directory, saved, base)
    return compare(saved, find.read(directory, model=base.model))
