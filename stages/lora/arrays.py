"""Arrays by name → a safetensors file, the same bytes for the same arrays. (`mx.load` reads it.)"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np


def write_arrays(path: Path, arrays: Mapping[str, mx.array], *, framework: str = "mlx") -> None:
    """Write arrays of types that NumPy knows; the file's metadata says for which framework.

    By safetensors' own writer: it orders tensors by name, where MLX's follows a hash map, and it reports a full disk.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # It writes memory as it lies: a transposed array must be laid out anew.
    rows_first = {name: np.array(array, order="C") for name, array in arrays.items()}
    try:
        save_file(rows_first, path, metadata={"format": framework})
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from None
    path.chmod(0o644)
