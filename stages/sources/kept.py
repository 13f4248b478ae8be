"""Model directories that were made of another format, kept in the store of this machine with their hashes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from stages.files.hashes import sha256
from stages.files.outputs import replacing

_SUMS = ".sha256sums"
_SUMS_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def keep(directory: Path, make: Callable[[Path], None]) -> dict[str, str]:
    """The sha256 of each file of a directory; `make` writes it first where it is not there, or not whole."""
    expected = _read_sums(directory / _SUMS)
    if not expected or any(not (directory / name).exists() for name in expected):
        with replacing(directory) as draft:
            make(draft)
            expected = {path.name: sha256(path) for path in sorted(draft.iterdir())}
            lines = [f"{digest}  {name}\n" for name, digest in expected.items()]
            (draft / _SUMS).write_text("".join(lines), encoding="utf-8")
    return expected


def _read_sums(path: Path) -> dict[str, str]:
    """File name → sha256; nothing if the list is missing or damaged."""
    try:
        lines = [_SUMS_LINE.fullmatch(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (FileNotFoundError, UnicodeDecodeError):
        return {}
    return {line[2]: line[1] for line in lines if line} if all(lines) else {}
