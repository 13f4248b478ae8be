"""Files that appear whole or not at all, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside `target` to write a file or a directory to; it takes the target's place if the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield draft
        _replace(draft, target)
    finally:
        _remove(draft)


def _replace(draft: Path, target: Path) -> None:
    if not target.is_dir() or target.is_symlink():
        draft.replace(target)
        return
    # A directory cannot be renamed over one that is not empty.
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(old)
    draft.rename(target)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with `\\n` line ends, whole or not at all."""
    with replacing(path) as draft:
        draft.write_bytes(text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON, keys in the order given.

    Raises:
        ValueError: a NaN or an infinity, on which `dvc metrics` breaks.
    """
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def sha256(path: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """Hex digest of a file's bytes; `advance` hears of every chunk's size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def digest_of(content: Any) -> str:
    """Hex sha256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
