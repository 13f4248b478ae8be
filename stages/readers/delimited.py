"""CSV and TSV → raw rows. The first line names the columns; a row's place is the line on which it starts.

The rules, beside RFC 4180's:

- A line end inside a quoted cell is `\\n`, however the file ends its lines.
- A blank between a delimiter and a quote is refused: the cell would keep its quotes, or be parted at its commas.
- A header or a byte-order mark further down is refused: a second file begins there.
- A cell that spells a missing value, as pandas reads and writes it (nan, None, NA, …), is an empty cell.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from stages.readers.rows import BYTE_ORDER_MARK, SECOND_FILE, Advance, BadRow, RawRow, nothing, read_lines

# What a .csv file may be separated by in truth: spreadsheets write semicolons where the comma is a decimal mark.
_OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}
# Source: pandas.read_csv, na_values, but for those that spell a failed computation.
MISSING = frozenset(
    ["nan", "NaN", "-nan", "-NaN", "None", "null", "NULL", "NA", "<NA>", "N/A", "n/a", "#NA", "#N/A", "#N/A N/A"]
)
_LONGEST_MISSING = 16  # with blanks around it: longer cells are not looked up
_BLANK_BEFORE_QUOTE = "a blank stands between a delimiter and a quote; remove it, or quote the whole cell"


def read_delimited(path: Path, advance: Advance = nothing, *, delimiter: str) -> Iterator[RawRow | BadRow]:
    """The rows of a file with a header; every cell is text."""
    header: list[str] | None = None
    for place, lines, record in _records(path, advance, delimiter):
        if isinstance(record, BadRow):
            yield record
        elif not record or (header is not None and len(record) == 1 < len(header) and not record[0].strip()):
            continue  # a blank line
        elif header is not None:
            reason = _wrong_record(record, header) or _blank_before_quote(lines, record, delimiter)
            yield BadRow(place, reason) if reason else _row(place, header, record)
        else:
            header = [name.strip() for name in record]
            if reason := _blank_before_quote(lines, record, delimiter) or _wrong_header(header, delimiter):
                yield BadRow(place, reason)
                return


def _wrong_record(record: list[str], header: list[str]) -> str | None:
    if record[0].startswith(BYTE_ORDER_MARK):
        return SECOND_FILE
    if record[0].strip() == header[0] and [cell.strip() for cell in record] == header:
        return "the header stands here again: a second file begins; part the two, or remove this line"
    return None


def _row(place: str, header: list[str], record: list[str]) -> RawRow | BadRow:
    if len(record) != len(header):
        reason = f"{len(record)} cells where the header has {len(header)}"
        return BadRow(place, f"{reason}; quote cells that hold the delimiter")
    fields = dict(zip(header, record, strict=True))
    missing: list[str] = []
    for name, cell in fields.items():
        if "\r" in cell:
            fields[name] = cell.replace("\r\n", "\n").replace("\r", "\n")
        elif len(cell) <= _LONGEST_MISSING and cell.strip() in MISSING:
            fields[name] = ""
            missing.append(name)
    return RawRow(place, fields, tuple(missing))


def _records(path: Path, advance: Advance, delimiter: str) -> Iterator[tuple[str, list[str], list[str] | BadRow]]:
    """Each record's place, lines and cells, or what is wrong with it. The lines hold until the next record."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines = _Lines(path, advance)
    records = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        place = f"{path}:{records.line_num + 1}"
        lines.taken.clear()
        try:
            record = next(records, None)
        except csv.Error as error:
            yield place, [], BadRow(place, _not_valid(error))
            continue
        except _UndecodableError as error:
            yield place, [], error.row
            return
        if record is None:
            return
        yield place, lines.taken, record


def _not_valid(error: csv.Error) -> str:
    if "new-line character" in str(error):  # csv's words advise on the reader's code
        return "a carriage return alone ends a line; save the file with \\n or \\r\\n at the ends of lines"
    return f"not valid CSV ({error}); quote the cell, and double the quotes inside it"


def _blank_before_quote(lines: list[str], record: list[str], delimiter: str) -> str | None:
    """The reason to refuse a record in which a quote follows a blank, and so counts as part of the cell; or None.

    A cell that is quoted as a whole may begin with a blank and a quote: read with blanks passed over, it stays.
    """
    if not any(' "' in line for line in lines):
        return None
    try:
        passed_over = next(csv.reader(iter(lines), delimiter=delimiter, skipinitialspace=True))
    except csv.Error:
        return _BLANK_BEFORE_QUOTE
    same = [cell.lstrip(" ") for cell in record] == [cell.lstrip(" ") for cell in passed_over]
    return None if same else _BLANK_BEFORE_QUOTE


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
    """The file's lines for csv.reader, which takes no BadRow; `taken` are those that it took for the present record."""

    def __init__(self, path: Path, advance: Advance) -> None:
        self._lines = read_lines(path, advance)
        self.taken: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        if isinstance(line, BadRow):
            raise _UndecodableError(line)
        self.taken.append(line[1])
        return line[1]
