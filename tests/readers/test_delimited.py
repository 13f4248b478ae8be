"""The rules of CSV and TSV: line ends, blanks before quotes, second files, missing values."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.readers.delimited import MISSING, read_delimited
from stages.readers.rows import BadRow, RawRow


def read(tmp_path: Path, text: str, delimiter: str = ",") -> list[RawRow | BadRow]:
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode())
    return list(read_delimited(path, delimiter=delimiter))


def cells(tmp_path: Path, text: str) -> list[list[str]]:
    rows = read(tmp_path, text)
    assert all(isinstance(row, RawRow) for row in rows)
    return [list(row.fields.values()) for row in rows if isinstance(row, RawRow)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("inside", ["\n", "\r\n", "\r"])
def test_a_line_end_in_a_cell_is_a_newline(tmp_path: Path, end: str, inside: str) -> None:
    assert cells(tmp_path, f'a,b{end}"one{inside}two",x{end}') == [["one\ntwo", "x"]]


@pytest.mark.parametrize("line", ['x, "y"', ' "x",y', 'x, "y, z"', 'x,  "y'])
def test_a_blank_before_a_quote_is_refused(tmp_path: Path, line: str) -> None:
    [good, bad, *_] = read(tmp_path, f"a,b\nq,r\n{line}\n")
    assert isinstance(good, RawRow)
    assert str(bad).endswith(
        "a.csv:3: a blank stands between a delimiter and a quote; remove it, or quote the whole cell"
    )


def test_a_blank_before_a_quote_in_the_header_is_refused(tmp_path: Path) -> None:
    [bad] = read(tmp_path, 'a, "b"\nq,r\n')
    assert "a.csv:1: a blank stands between a delimiter and a quote" in str(bad)


@pytest.mark.parametrize(
    ("line", "cell"),
    [
        ('x," ""y"""', ' "y"'),
        ("x,  y", "  y"),
        ('x, he said "y"', ' he said "y"'),
        ('x,"he said, ""y"""', 'he said, "y"'),
    ],
)
def test_other_blanks_and_quotes_stay(tmp_path: Path, line: str, cell: str) -> None:
    assert cells(tmp_path, f"a,b\n{line}\n") == [["x", cell]]


@pytest.mark.parametrize("header", ["a,b", " a , b", '"a","b"'])
def test_a_second_header_is_refused(tmp_path: Path, header: str) -> None:
    [_, bad, good] = read(tmp_path, f"a,b\n1,2\n{header}\n3,4\n")
    assert isinstance(bad, BadRow)
    assert "a.csv:3: the header stands here again: a second file begins; part the two" in str(bad)
    assert isinstance(good, RawRow)


def test_a_second_byte_order_mark_is_refused(tmp_path: Path) -> None:
    [_, bad, _] = read(tmp_path, "\ufeffa,b\n1,2\n\ufeffa,b\n3,4\n")
    assert "a.csv:3: a byte-order mark: a second file begins here; part the two" in str(bad)


@pytest.mark.parametrize("word", sorted(MISSING))
def test_a_cell_that_spells_a_missing_value_is_empty_and_named(tmp_path: Path, word: str) -> None:
    [row] = read(tmp_path, f"a,b\nx, {word}\n")
    assert isinstance(row, RawRow)
    assert (row.fields, row.missing) == ({"a": "x", "b": ""}, ("b",))


@pytest.mark.parametrize("word", ["none", "None.", "NAN is not a number", "nano", "0"])
def test_other_words_are_no_missing_value(tmp_path: Path, word: str) -> None:
    [row] = read(tmp_path, f"a,b\nx,{word}\n")
    assert isinstance(row, RawRow)
    assert (row.fields, row.missing) == ({"a": "x", "b": word}, ())


def test_lines_that_end_in_a_carriage_return_alone_are_refused(tmp_path: Path) -> None:
    [bad] = read(tmp_path, "a,b\r1,2\r")
    assert "a.csv:1: a carriage return alone ends a line; save the file with \\n or \\r\\n at the ends of" in str(bad)
