"""The sources of base models: the built-in alias, the Hugging Face Hub, a local directory, a local GGUF.

`obtain(model)` answers with a complete folder on this machine. It asks the network only for what this machine lacks.
What base.json pins, as long as params.yaml asks for the same, stays what it is, though a branch of the Hub moved.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from stages.base.manifest import LOCAL, Manifest, difference, stamps
from stages.base.records import Record, read_records
from stages.files.hashes import sha256
from stages.params.schema import Model
from stages.sources.copies import Copy, license_of
from stages.sources.file import FILE, from_file, revision
from stages.sources.hub import from_hub
from stages.sources.package import PACKAGES, from_package


@dataclass(frozen=True)
class Source:
    """A source that `model.source` names: its name in base.json, and the folder of a local directory.

    Of a local file in GGUF `file` is where it is, and `digest` its sha256.
    """

    name: str
    directory: Path | None = None
    file: Path | None = None
    digest: str = ""


def recognise(model: Model) -> Source:
    """The kind of source that params.yaml names.

    Raises:
        ValueError: it is none, or has no such revision.
    """
    if model.source in PACKAGES:
        if model.revision is not None:
            raise ValueError(f"model.revision: the built-in {model.source} has one revision only; set it to null")
        return Source(model.source)
    if file := _local(model.source, Path.is_file):
        if model.revision is not None:
            raise ValueError(f"model.revision: {model.source} is a local file, which has no revisions; set it to null")
        if file.suffix.lower() != ".gguf":
            raise ValueError(f"model.source: {model.source} is a file, and no .gguf; name a model's folder or a .gguf")
        return Source(f"{FILE}{file.name}", file=file, digest=sha256(file))
    if directory := _local(model.source, Path.is_dir):
        if model.revision is not None:
            raise ValueError(
                f"model.revision: {model.source} is a local directory, which has no revisions; set it to null"
            )
        return Source(f"{LOCAL}{directory.name}", directory)
    if model.source.startswith((".", "/", "~")) or model.source.count("/") != 1:
        raise ValueError(
            f"model.source: {model.source!r} is neither a directory, nor a .gguf, nor a Hub id (org/name), "
            f"nor a built-in model ({', '.join(PACKAGES)})"
        )
    return Source(model.source)


def _local(source: str, is_there: Callable[[Path], bool]) -> Path | None:
    """The local path of that name, if it is there: here, or in the project that an experiment of DVC is of."""
    path = Path(os.path.expanduser(source))  # noqa: PTH111  Path's own raises where there is no such user
    for start in (Path(), Path(os.environ.get("DVC_ROOT", "."))):
        if is_there(start / path):
            return (start / path).resolve()
    return None


def is_pin(manifest: Manifest, model: Model, source: Source) -> bool:
    """True if base.json is of the model that params.yaml asks for now."""
    if manifest.source != source.name:
        return False
    if source.name in PACKAGES:
        return manifest.revision == PACKAGES[source.name].requirement
    if source.file is not None:
        return manifest.revision == revision(source.digest)
    return source.directory is not None or model.revision in (manifest.requested, manifest.revision)


def find_pinned(model: Model, source: Source, pin: Manifest) -> Record | None:
    """An unchanged folder of the base model of base.json, with its stamps now; of a local directory, this one alone."""
    for record in read_records(pin.identity):
        here = source.directory is None or record.directory == source.directory
        if here and record.with_code == model.trust_remote_code and record.directory.is_dir():
            now = replace(record, seen=stamps(record.directory))
            if difference(pin, record) is None:
                return now
    return None


def obtain(model: Model, source: Source, *, pin: Manifest | None, refresh: bool = False) -> Copy:
    """A copy of the base model, at the revision of the `pin`; `refresh` asks the Hub where a branch stands now.

    Raises:
        ValueError: the source cannot be reached and is not on this machine.
    """
    if source.name in PACKAGES:
        return from_package(source.name)
    if source.file:
        return from_file(source.file, source.digest)
    if source.directory:
        return Copy(source.directory, source.name, None, {}, license_of(source.directory))
    wanted = pin.revision if pin else model.revision
    return from_hub(source.name, wanted, with_code=model.trust_remote_code, refresh=refresh, pinned=pin is not None)
