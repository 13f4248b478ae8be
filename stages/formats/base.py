"""The base model of an adapter, as far as it is known on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn

from stages.base.manifest import Manifest, locate
from stages.base.records import read_records
from stages.lora import adapter
from stages.lora.adapter_files import Saved
from stages.model.arrays import read_arrays
from stages.model.load import load_base


@dataclass(frozen=True)
class Base:
    """The manifest, None if there is none; its folder and bare model, None if its files are not on this machine."""

    manifest: Manifest | None = None
    directory: Path | None = None
    model: nn.Module | None = None

    @property
    def hub_id(self) -> str | None:
        """The base's id on the Hub; None for a local folder and the built-in model, which have none."""
        name = self.manifest.source if self.manifest else ""
        return name if name.count("/") == 1 and ":" not in name else None

    @property
    def tensor_names(self) -> set[str]:
        """Names of all tensors in the base's files, as they are on the Hub."""
        if self.directory is None:
            return set()
        files = sorted(self.directory.glob("model*.safetensors"))
        return {name for path in files for name in read_arrays(path, "fetch the base anew: python -m stages.fetch")}

    def check(self, saved: Saved) -> None:
        """Raise ValueError if an adapter does not fit the base, where it is there."""
        if self.model is not None:
            try:
                adapter.put(self.model, saved)
            finally:
                adapter.take_off(self.model)


def open_base(manifest: Manifest | None, *, trust_remote_code: bool = False) -> Base:
    """The base model of a manifest; weights are read when they are first computed with.

    Raises:
        ValueError: files of the base differ from the manifest.
    """
    if manifest is None or not read_records(manifest.identity):
        return Base(manifest)
    directory = locate(manifest)
    model, _ = load_base(directory, trust_remote_code=trust_remote_code)
    return Base(manifest, directory, model)
