"""CSV and TSV → raw rows. The first line names the columns; a row's place is the line on which it starts.

Source: RFC 4180.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from stages.readers.rows import Advance, BadRow, RawRow, nothing, read_lines

# What a .csv file may be separated by in truth: spreadsheets write semicolons where the comma is a decimal mark.
_OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def read_delimited(path: Path, advance: Advance = nothing, *, delimiter: str) -> Iterator[RawRow | BadRow]:
    """The rows of a file with a header; every cell is text."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    records = csv.reader(_Lines(path, advance), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        start = records.line_num + 1
        try:
            record = next(records, None)
        except csv.Error as error:
            yield BadRow(f"{path}:{start}", f"not valid CSV ({error}); quote the cell, and double the quotes inside it")
            continue
        except _UndecodableError as error:
            yield error.row
            return
        if record is None:
            return
        place = f"{path}:{start}"
        if not record or (header is not None and len(record) == 1 < len(header) and not record[0].strip()):
            continue  # a blank line
        if header is None:
            header = [name.strip() for name in record]
            if reason := _wrong_header(header, delimiter):
                yield BadRow(place, reason)
                return
        elif len(record) != len(header):
            reason = f"{len(record)} cells where the header has {len(header)}"
            yield BadRow(place, f"{reason}; quote cells that hold the delimiter")
        else:
            yield RawRow(place, dict(zip(header, record, strict=True)))


def _wrong_header(header: list[str], delimiter: str) -> str | None:
    if len(header) == 1:
        for mark, name in _OTHER_DELIMITERS.items():
            if mark in header[0] and mark != delimiter:
                return f"the cells are parted by {name}; save the file with commas (.csv) or tabs (.tsv)"
    if "" in header:
        return f"column {header.index('') + 1} has no name; the first line must name the columns"
    for name in header:
        if header.count(name) > 1:
            return f"two columns are called {name!r}; rename one"
    return None


class _UndecodableError(Exception):
    def __init__(self, row: BadRow) -> None:
        self.row = row


class _Lines:
    """The file's lines for csv.reader, which takes no BadRow."""

    def __init__(self, path: Path, advance: Advance) -> None:
        self._lines = read_lines(path, advance)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        if isinstance(line, BadRow):
            raise _UndecodableError(line)
        return line[1]
