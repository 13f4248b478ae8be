"""A path → the adapter that lies there, its format recognised from its files."""

from __future__ import annotations

from pathlib import Path

import mlx.nn as nn

from stages.adapters import npz, peft
from stages.files.hashes import digest_of, sha256
from stages.lora import adapter_files
from stages.lora.adapter_files import Saved

# The files of each format, in a folder; an .npz file is named itself.
_FILES = {
    "peft": (peft.WEIGHTS_FILE, peft.CONFIG_FILE),
    "mlx": (adapter_files.WEIGHTS_FILE, adapter_files.CONFIG_FILE),
    "npz": ("adapters.npz",),
}


def kind_of(path: Path) -> str:
    """The format of an adapter: `mlx`, `peft` or `npz`.

    Raises:
        ValueError: a file that is no .npz, or a folder of several adapters.
    """
    if path.suffix == ".npz" and not path.is_dir():
        return "npz"
    if path.is_file():
        raise ValueError(f"{path}: no adapter; name an adapter's folder, or an .npz file")
    here = [kind for kind, names in _FILES.items() if (path / names[0]).exists()]
    if len(here) > 1:
        raise ValueError(
            f"{path}: holds several adapters ({', '.join(_FILES[kind][0] for kind in here)}); "
            "put each into a folder of its own"
        )
    if not here and (path / "adapter_model.bin").exists():
        return "peft"
    return here[0] if here else "mlx"


def read(path: Path, *, model: nn.Module | None = None) -> Saved:
    """Read an adapter of any of the formats; `model` is the base model, bare.

    Raises:
        ValueError: it is missing, damaged, or has no exact form here.
    """
    kind = kind_of(path)
    if kind == "mlx":
        return adapter_files.read(path)
    return peft.read(path, model=model) if kind == "peft" else npz.read(_files(path)[0], model=model)


def digest(path: Path) -> str:
    """A digest of the files that an adapter is read from."""
    return digest_of({file.name: sha256(file) for file in _files(path)})


def _files(path: Path) -> list[Path]:
    """The files of an adapter, its weights first."""
    kind = kind_of(path)
    files = [path / name for name in _FILES[kind]] if path.is_dir() else [path]
    config = npz.config_beside(files[0]) if kind == "npz" else None
    return [*files, config] if config else files
