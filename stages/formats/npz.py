"""Our adapter → a NumPy archive, as the LoRA script of MLX's examples reads it: B holds what makes the scale 20."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np

from stages.adapters.npz import SCALE
from stages.adapters.parts import split
from stages.formats.base import Base
from stages.lora.adapter_files import Saved

FILE = "adapters.npz"


def write(directory: Path, saved: Saved, base: Base) -> None:
    """Write the archive. The same adapter gives the same bytes.

    Raises:
        ValueError: the archive has no form for DoRA, experts or embeddings.
    """
    parts = split(saved)
    embeddings = [name for name in parts if "embed" in name.rpartition(".")[2]]
    experts = [name for name, part in parts.items() if part.is_switch]
    if saved.config.type == "dora" or embeddings or experts:
        what = "DoRA" if saved.config.type == "dora" else [*embeddings, *experts][0]
        raise ValueError(
            f"{saved.weights_path}: an .npz adapter has no form for {what}; take --to mlx or peft, or merge the "
            "adapter (python -m stages.merge)"
        )
    directory.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(directory / FILE, "w", zipfile.ZIP_STORED) as archive:
        for name, part in sorted(parts.items()):
            b = part.b if part.scale == SCALE else part.b * (part.scale / SCALE)
            for kind, array in (("lora_a", part.a), ("lora_b", b)):
                stream = io.BytesIO()
                np.lib.format.write_array(stream, np.ascontiguousarray(array.astype(mx.float32)), allow_pickle=False)
                # numpy.savez would write the time of day into the archive.
                archive.writestr(zipfile.ZipInfo(f"{name}.{kind}.npy"), stream.getvalue())
