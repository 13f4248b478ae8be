"""A NumPy archive of LoRA matrices → our adapter.

The LoRA script of MLX's examples wrote these (`adapters.npz`): `model.layers.N.self_attn.q_proj.lora_a` (in, rank) and
`lora_b` (rank, out), no config beside them. Its scale is 20; the ranks are in the shapes. The first versions of mlx-lm
wrote the same archive with an `adapter_config.json` beside it, which has the scale.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from stages.adapters.parts import Part, check, join
from stages.files.outputs import read_json
from stages.lora.adapter_files import CONFIG_FILE, Saved, scale_of

SCALE = 20.0
_HINT = "an archive of lora_a and lora_b matrices is wanted, as numpy.savez writes it"


def read(path: Path, *, model: nn.Module | None = None) -> Saved:
    """Read an archive; the base model, if given, says how many layers there are.

    Raises:
        ValueError: it is missing, damaged, pickled, or no archive of LoRA matrices.
    """
    arrays = _read_arrays(path)
    config = config_beside(path)
    scale = _read_scale(config) if config else SCALE
    names = sorted({name.rpartition(".")[0] for name in arrays})
    foreign = sorted(set(arrays) - {f"{name}.{kind}" for name in names for kind in ("lora_a", "lora_b") if name})
    if foreign or not names:
        raise ValueError(f"{path}: {foreign[0] if foreign else 'empty: it'} is no LoRA matrix; {_HINT}")
    parts = {}
    for name in names:
        pair = [arrays.get(f"{name}.{kind}") for kind in ("lora_a", "lora_b")]
        if pair[0] is None or pair[1] is None:
            raise ValueError(f"{path}: {name} has one of lora_a and lora_b alone; take a whole copy of the adapter")
        parts[name] = Part(pair[0], pair[1], scale)
        check(parts[name], name, path)
        if parts[name].is_switch:
            raise ValueError(f"{path}: {name} has matrices of three dimensions; {_HINT}")
    layers = len(model.layers) if model is not None else None
    return join(parts, dropout=0.0, layers=layers, config_path=config or path, weights_path=path)


def config_beside(path: Path) -> Path | None:
    """The config that belongs to an archive: one that is not there for an adapter in safetensors."""
    config = path.parent / CONFIG_FILE
    is_its_own = config.exists() and not any(path.parent.glob("adapter*.safetensors"))
    return config if is_its_own else None


def _read_scale(path: Path) -> float:
    content = read_json(path, "take a whole copy of the adapter")
    try:
        return float(scale_of(content))
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: not an adapter's config ({type(error).__name__}: {error})") from None


def _read_arrays(path: Path) -> dict[str, mx.array]:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            return {name: _as_float(name, archive[name]) for name in archive.files}
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {_HINT}") from None
    except (
        ValueError, KeyError, OSError, EOFError, MemoryError, RuntimeError,
        struct.error, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: damaged or not an archive of arrays ({reason}); {_HINT}") from None


def _as_float(name: str, array: object) -> mx.array:
    """The array in float32. NumPy has no bfloat16: such an array comes as two bytes of no type."""
    if isinstance(array, np.ndarray) and array.dtype == np.dtype("V2"):
        return mx.array(array.view(np.uint16)).view(mx.bfloat16).astype(mx.float32)
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise ValueError(f"{name} is no array of floating-point numbers")
    return mx.array(array.astype(np.float32))
