"""A base model out of a GGUF file of the user's."""

from __future__ import annotations

from pathlib import Path

from stages.base import store
from stages.sources.copies import Copy
from stages.sources.kept import keep

FILE = "file:"  # before the name of a local file, in a manifest's source


def revision(digest: str) -> str:
    """The revision of a file: what is in it."""
    return f"sha256:{digest}"


def from_file(path: Path, digest: str) -> Copy:
    """The model in a GGUF as a directory in the store, made once for each content of the file.

    Raises:
        ValueError: it is no GGUF, or one that cannot be converted.
    """
    from stages.sources import gguf  # with NumPy, which a look at what is there does without

    directory = store.root() / "models" / f"{path.stem}-{digest[:16]}"
    expected = keep(directory, lambda draft: gguf.convert(path, draft))
    return Copy(directory, f"{FILE}{path.name}", revision(digest), expected)
