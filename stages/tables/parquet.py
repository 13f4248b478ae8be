"""Read and write a whole table as a Parquet file; the same rows give the same bytes under the same pyarrow."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_BASE = b"base"  # the key of the file's metadata under which the base model's identity stands


def write_table(path: Path, table: Any, *, base: str) -> None:
    """Write a table of what the base model of this identity, or an adapter on it, scored or answered."""
    pq.write_table(table.replace_schema_metadata({_BASE: base}), path, compression="zstd")


def read_table(path: Path, columns: Iterable[str], *, base: str, made_by: str) -> Any:
    """Read a table that has at least these columns; `made_by` is the stage that writes it.

    Raises:
        ValueError: the file is missing, damaged, has other columns, or comes from another base model.
    """
    hint = f"make it anew with: python -m stages.{made_by}"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; make it with: python -m stages.{made_by}") from None
    table = parse_table(content, str(path), columns, hint=hint)
    if (table.schema.metadata or {}).get(_BASE) != base.encode():
        raise ValueError(f"{path}: made with another base model; {hint}")
    return table


def parse_table(
    content: bytes, name: str, columns: Iterable[str], *, hint: str = "make it anew with: dvc repro"
) -> Any:
    """A table from a file's bytes, which must have these columns; `name` stands in messages.

    Raises:
        ValueError: it is damaged, or has other columns.
    """
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowInvalid, OSError):
        raise ValueError(f"{name}: damaged: not a Parquet file; {hint}") from None
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise ValueError(f"{name}: has no column {missing[0]}; {hint}")
    return table
