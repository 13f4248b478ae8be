"""Hashes of files and of JSON values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
