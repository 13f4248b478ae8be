"""Write and read token rows as Parquet; the file's metadata says what they were made from.

The same rows give the same bytes under the same pyarrow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.files.outputs import replacing
from stages.tokens.row import TokenRow

_KEY = "lorabuild"
_ROW_GROUP = 4096
_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("trained_tokens", pa.int32(), nullable=False),
        pa.field("trained_bytes", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("group", pa.string()),
        pa.field("carried", pa.map_(pa.string(), pa.string()), nullable=False),
    ]
)
# A dictionary of token ids costs more time than it saves space. Masks are long runs of equal values, as RLE wants them.
_ENCODING: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": False,
    "column_encoding": {"input_ids.list.element": "BYTE_STREAM_SPLIT", "loss_mask.list.element": "RLE"},
    "write_statistics": False,
}


def write_tokens(path: Path, rows: Iterable[TokenRow], metadata: Callable[[], dict[str, Any]]) -> None:
    """Write token rows and, in the file's footer, metadata (tokenizer, policy, ledger, …) as JSON.

    `metadata` is called after the last row, when its counts are known.
    """
    with replacing(path) as draft, pq.ParquetWriter(draft, _SCHEMA, **_ENCODING) as writer:
        group: list[TokenRow] = []
        for row in rows:
            group.append(row)
            if len(group) == _ROW_GROUP:
                writer.write_table(_table(group))
                group = []
        if group:
            writer.write_table(_table(group))
        writer.add_key_value_metadata({_KEY: json.dumps(metadata(), sort_keys=True, ensure_ascii=False)})


def read_metadata(path: Path) -> dict[str, Any]:
    """Read a token file's metadata.

    Raises:
        ValueError: the file is missing or is none of ours.
    """
    with _open(path) as file:
        try:
            about = dict(json.loads(file.metadata.metadata[_KEY.encode()]))
        except (KeyError, TypeError, ValueError):
            about = {}
    if "tokenizer" not in about:
        raise ValueError(f"{path}: its metadata is damaged; make it anew with: python -m stages.tokenize")
    return about


def read_tokens(path: Path, *, tokenizer: str) -> list[TokenRow]:
    """Read all token rows of a file, which must have been made with the tokenizer of this identity.

    Raises:
        ValueError: the file is missing, is none of ours, or comes from another tokenizer.
    """
    if read_metadata(path)["tokenizer"] != tokenizer:
        raise ValueError(f"{path}: made with another base model's tokenizer; run: python -m stages.tokenize")
    with _open(path) as file:
        return [row for group in range(file.num_row_groups) for row in _rows(file.read_row_group(group))]


def read_row(path: Path, number: int) -> TokenRow:
    """Read one token row, counted from 0.

    Raises:
        ValueError: there is no such row, or the file is none of ours.
    """
    with _open(path) as file:
        left = number
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if 0 <= left < count:
                return _rows(file.read_row_group(group).slice(left, 1))[0]
            left -= count
        raise ValueError(f"{path}: has no row {number}; its rows are 0 to {file.metadata.num_rows - 1}")


def read_lengths(path: Path) -> np.ndarray:
    """Read the lengths in tokens of all rows."""
    with _open(path) as file:
        return np.asarray(file.read(["tokens"])["tokens"].to_numpy())


def _open(path: Path) -> Any:
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; make it with: python -m stages.tokenize") from None
    except (pa.ArrowInvalid, OSError):
        raise ValueError(f"{path}: not a Parquet file; make it anew with: python -m stages.tokenize") from None
    if _KEY.encode() not in (file.metadata.metadata or {}):
        file.close()
        raise ValueError(f"{path}: not a token file of this project; make it with: python -m stages.tokenize")
    return file


def _rows(table: Any) -> list[TokenRow]:
    ids, masks = table["input_ids"].combine_chunks(), table["loss_mask"].combine_chunks()
    borders = ids.offsets.to_numpy()
    flat, trained = ids.values.to_numpy(), masks.values.to_numpy(zero_copy_only=False)
    names = ("id", "source", "trained_bytes", "truncated", "group", "carried")
    others = zip(*(table[name].to_pylist() for name in names), strict=True)
    return [
        TokenRow(name, source, flat[begin:end], trained[begin:end], trained_bytes, truncated, group, dict(carried))
        for (name, source, trained_bytes, truncated, group, carried), begin, end in zip(
            others, borders[:-1], borders[1:], strict=True
        )
    ]


def _table(rows: list[TokenRow]) -> Any:
    lengths = np.array([len(row.input_ids) for row in rows])
    borders = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    mask = np.concatenate([row.loss_mask for row in rows])
    trained = np.add.reduceat(mask, borders.to_numpy()[:-1], dtype=np.int32)
    columns = [
        [row.id for row in rows],
        [row.source for row in rows],
        pa.ListArray.from_arrays(borders, pa.array(np.concatenate([row.input_ids for row in rows]))),
        pa.ListArray.from_arrays(borders, pa.array(mask)),
        lengths.astype(np.int32),
        trained,
        [row.trained_bytes for row in rows],
        [row.truncated for row in rows],
        [row.group for row in rows],
        [list(row.carried.items()) for row in rows],
    ]
    # pa.array would take a list array apart into Python objects.
    arrays = [c if isinstance(c, pa.Array) else pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=_SCHEMA)
