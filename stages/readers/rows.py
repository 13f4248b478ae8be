"""Raw rows and where they stood, and the way from a file's bytes to lines of text.

A reader (jsonl.py, delimited.py, columnar.py) yields a `RawRow` or, for what it cannot read, a `BadRow`: whether a bad
row ends the run or is counted is the caller's choice.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BYTE_ORDER_MARK = "\ufeff"
SECOND_FILE = "a byte-order mark: a second file begins here; part the two, or remove the mark (and a second header)"
CODECS = {".gz": "gzip", ".zst": "zstd"}

Advance = Callable[[int], None]  # hears how many bytes of a file were just read


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of a file, and its place as `file:line` (of Parquet and Arrow: `file:row`).

    `missing` names the columns whose cell spells a missing value (CSV): the cell itself is empty here.
    """

    place: str
    fields: dict[str, Any]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read: its place, and the reason with what to do."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def strict(rows: Iterable[RawRow | BadRow]) -> Iterator[RawRow]:
    """The rows, as long as they are good.

    Raises:
        ValueError: at the first bad one, `file:line: what; what to do`.
    """
    for row in rows:
        if isinstance(row, BadRow):
            raise ValueError(str(row))
        yield row


def suffixes(path: Path) -> tuple[str, str | None]:
    """A file's format suffix and its compression: `rows.jsonl.gz` → (".jsonl", "gzip")."""
    codec = CODECS.get(path.suffix.lower())
    return (Path(path.stem).suffix if codec else path.suffix).lower(), codec


def nothing(count: int) -> None:
    """An `Advance` that does not care."""


@contextmanager
def open_bytes(path: Path, advance: Advance = nothing) -> Iterator[io.BufferedReader]:
    """A file's bytes, decompressed as its name says. A broken stream raises OSError on reading."""
    import pyarrow as pa

    codec = suffixes(path)[1]
    with path.open("rb") as file:
        heard: Any = _Heard(file, advance)
        if codec is None:
            yield io.BufferedReader(heard, 1 << 18)
        else:
            # Unlike the gzip module, pyarrow knows zstd; both report a stream that ends too early.
            packed = pa.PythonFile(io.BufferedReader(heard, 1 << 18), mode="r")
            yield io.BufferedReader(pa.CompressedInputStream(packed, codec), 1 << 18)


def read_lines(path: Path, advance: Advance = nothing) -> Iterator[tuple[int, str] | BadRow]:
    """Numbered lines of a UTF-8 file, with or without a byte-order mark, line ends kept; BadRow for what is not UTF-8.

    A compressed stream that breaks off ends in a BadRow as well.
    """
    number = 0
    with open_bytes(path, advance) as file:
        while True:
            try:
                line = file.readline()
            except OSError as error:
                yield BadRow(f"{path}:{number + 1}", broken_stream(error))
                return
            if not line:
                return
            number += 1
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield BadRow(f"{path}:{number}", not_utf8(line, error.start))


def not_utf8(line: bytes, position: int) -> str:
    """The reason to refuse a line whose byte at `position` does not belong to UTF-8 text."""
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "this is UTF-16 (byte 1); save the file as UTF-8"
    return f"byte {position + 1} (0x{line[position]:02x}) is not UTF-8; save the file as UTF-8"


def broken_stream(error: OSError) -> str:
    """The reason to refuse a compressed file that cannot be read to its end."""
    return f"the compressed stream is broken here ({error}); copy or download the file anew"


class _Heard(io.RawIOBase):
    """A file that tells how much of it was read."""

    def __init__(self, file: io.BufferedReader, advance: Advance) -> None:
        self._file, self._advance = file, advance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._advance(count)
        return count
