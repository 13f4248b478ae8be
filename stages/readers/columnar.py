"""Parquet, Arrow and datasets saved to disk → raw rows, a slice of a record batch at a time.

A row's place is `file:row`, counted from 1. These formats unite the keys of all rows: what is null inside a nested
value is a key that other rows have, and is left out here.

Source: Apache Arrow's IPC formats; `Dataset.save_to_disk` of Hugging Face datasets, which writes Arrow streams beside a
state.json that names them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.readers.rows import Advance, BadRow, RawRow, nothing

_SLICE = 1024  # rows that become Python objects at a time


def read_parquet(path: Path, advance: Advance = nothing) -> Iterator[RawRow | BadRow]:
    """The rows of a Parquet file."""
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        rows = max(file.metadata.num_rows, 1)
    except _broken() as error:
        yield BadRow(f"{path}:1", f"not a readable Parquet file ({_first_line(error)}); copy or make it anew")
        return
    with file:
        yield from _rows(path, file.iter_batches(_SLICE), advance, path.stat().st_size / rows)


def read_arrow(path: Path, advance: Advance = nothing) -> Iterator[RawRow | BadRow]:
    """The rows of an Arrow file, in the stream or the file format."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            yield from _rows(path, _batches(source), advance, 0)
        advance(path.stat().st_size)
    except _broken() as error:
        yield BadRow(f"{path}:1", f"not a readable Arrow file ({_first_line(error)}); copy or make it anew")


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a dataset saved to disk, in its order.

    Raises:
        ValueError: its state.json is broken or names a file that is not there.
    """
    state = folder / "state.json"
    try:
        names = [entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{state}: does not name the dataset's files; save the dataset anew") from None
    for name in names:
        if not isinstance(name, str) or not (folder / name).is_file():
            raise ValueError(f"{state}: names {name}, which is not there; copy the whole folder")
    return [folder / name for name in names]


def without_nulls(value: Any) -> Any:
    """A nested value without the keys that hold null, at any depth; a list keeps its nulls."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _batches(source: Any) -> Iterator[Any]:
    import pyarrow as pa

    try:
        reader = pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        reader = pa.ipc.open_file(source)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from reader


def _rows(path: Path, batches: Iterator[Any], advance: Advance, row_bytes: float) -> Iterator[RawRow | BadRow]:
    import pyarrow as pa

    number = 0
    try:
        for batch in batches:
            if twice := next((name for name in batch.schema.names if batch.schema.names.count(name) > 1), None):
                yield BadRow(f"{path}:1", f"two columns are called {twice!a}; rename one")
                return
            nested = [field.name for field in batch.schema if pa.types.is_nested(field.type)]
            for start in range(0, len(batch), _SLICE):
                part = batch.slice(start, _SLICE)
                for fields in part.to_pylist():
                    number += 1
                    for name in nested:
                        fields[name] = without_nulls(fields[name])
                    yield RawRow(f"{path}:{number}", fields)
                advance(int(row_bytes * len(part)))
    except _broken() as error:
        yield BadRow(f"{path}:{number + 1}", f"cannot be read on ({_first_line(error)}); copy or make the file anew")


def _broken() -> tuple[type[Exception], ...]:
    """The exceptions that pyarrow raises on files that are damaged or hold what Python cannot."""
    import pyarrow as pa

    return (pa.ArrowException, OSError, ValueError, OverflowError, NotImplementedError)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
