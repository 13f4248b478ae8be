"""A safetensors file → its arrays by name, or one line that says what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import mlx.core as mx


def read_arrays(path: Path, hint: str) -> dict[str, mx.array]:
    """The arrays of a file by name, each read from the disk when it is first used; `hint` says how to mend a bad one.

    Raises:
        ValueError: the file is missing or no safetensors; the message names it and ends in the hint.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file; {hint}")
    try:
        return cast(dict[str, mx.array], mx.load(str(path)))
    except RuntimeError as error:
        raise ValueError(f"{path}: damaged: not safetensors ({' '.join(str(error).split())}); {hint}") from None
