"""Parquet, Arrow and the Hub's data sets: a null inside a nested value is a key that other rows have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.readers.columnar import read_arrow, read_parquet
from stages.readers.hub import read_split
from stages.readers.rows import BadRow, RawRow


def parquet(path: Path, table: pa.Table) -> list[RawRow | BadRow]:
    pq.write_table(table, path)
    return list(read_parquet(path))


def arrow(path: Path, table: pa.Table) -> list[RawRow | BadRow]:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return list(read_arrow(path))


def hub(path: Path, table: pa.Table) -> list[RawRow | BadRow]:
    return list(read_split("org/name/train", table.to_pylist()))


ROWS: list[dict[str, Any]] = [
    {"turns": [{"call": {"city": "Busan"}, "deep": [{"a": 1}]}], "tools": {"f": {}}},
    {"turns": [{"call": {"zone": "KST"}}, {"deep": [{"b": [2, None]}]}], "tools": {"f": {"x": 1}}},
]


@pytest.mark.parametrize("read", [parquet, arrow, hub])
def test_keys_of_other_rows_are_absent(tmp_path: Path, read: Callable[..., list[RawRow]]) -> None:
    found = [row.fields for row in read(tmp_path / "a", pa.Table.from_pylist(ROWS))]
    assert found == ROWS


@pytest.mark.parametrize("read", [parquet, arrow])
def test_a_null_column_stays_null(tmp_path: Path, read: Callable[..., list[RawRow]]) -> None:
    table = pa.Table.from_pylist([{"a": "x", "n": {"b": 1}}, {"a": None, "n": None}])
    assert read(tmp_path / "a", table)[1].fields == {"a": None, "n": None}


@pytest.mark.parametrize("read", [parquet, arrow])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, read: Callable[..., list[BadRow]]) -> None:
    [bad] = read(tmp_path / "a", pa.table([pa.array(["q"]), pa.array(["r"])], names=["question", "question"]))
    assert str(bad).endswith("a:1: two columns are called 'question'; rename one")
