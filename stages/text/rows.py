"""Raw rows: JSONL files → dictionaries that know where they stood.

Source: the JSON Lines format (jsonlines.org).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RawRow:
    """One JSON object of a file, and its place as `file:line`."""

    place: str
    fields: dict[str, Any]


def jsonl_files(paths: Iterable[Path]) -> list[Path]:
    """The .jsonl files among `paths` and inside the folders among them, in a fixed order.

    Raises:
        ValueError: a path does not exist, or there is no file at all.
    """
    files: list[Path] = []
    paths = list(paths)
    for path in paths:
        if path.is_dir():
            files += sorted(path.rglob("*.jsonl"))
        elif path.exists():
            files.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder; put your rows there as .jsonl")
    if not files:
        raise ValueError(f"{', '.join(map(str, paths))}: no .jsonl file in it; put your rows there")
    return files


def read_jsonl(path: Path) -> Iterator[RawRow]:
    """The rows of a UTF-8 file, blank lines passed over.

    Raises:
        ValueError: a line that is not UTF-8, not JSON or not an object; a file without rows.
    """
    count = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
            if not text.strip():
                continue
            try:
                fields = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                reason = (
                    f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
                )
                raise ValueError(f"{place}: not valid JSON ({reason}); each line must hold one object") from None
            if not isinstance(fields, dict):
                raise ValueError(f'{place}: must be an object such as {{"question": "…", "answer": "…"}}')
            count += 1
            yield RawRow(place, fields)
    if count == 0:
        raise ValueError(f"{path}: holds no rows; add some or remove the file")
