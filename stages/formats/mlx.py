"""An adapter → mlx-lm's format, which is ours."""

from __future__ import annotations

from pathlib import Path

from stages.adapters.parts import split
from stages.formats.base import Base
from stages.lora import adapter_files
from stages.lora.adapter_files import Saved


def write(directory: Path, saved: Saved, base: Base) -> None:
    """Write `adapters.safetensors` and `adapter_config.json`.

    Raises:
        ValueError: the adapter's tensors do not fit one another.
    """
    split(saved)
    adapter_files.write(directory, saved.arrays, saved.config)
