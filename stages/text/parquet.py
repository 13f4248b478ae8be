"""Token rows ↔ Parquet, with the identity of what made them in the file's metadata.

The same rows give the same bytes under the same pyarrow.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.files import replacing
from stages.text.tokens import TokenRow

_KEY = b"lorabuild"
_ROW_GROUP = 4096
_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
        pa.field("trained_bytes", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
    ]
)


def write_tokens(path: Path, rows: Iterable[TokenRow], metadata: dict[str, Any]) -> None:
    """Write token rows; `metadata` (tokenizer, max_length, train_on, …) becomes JSON in the file's footer."""
    schema = _SCHEMA.with_metadata({_KEY: json.dumps(metadata, sort_keys=True).encode()})
    with replacing(path) as draft, pq.ParquetWriter(draft, schema, compression="zstd") as writer:
        group: list[TokenRow] = []
        for row in rows:
            group.append(row)
            if len(group) == _ROW_GROUP:
                writer.write_table(_table(group, schema))
                group = []
        if group:
            writer.write_table(_table(group, schema))


def read_tokens(path: Path, *, tokenizer: str) -> list[TokenRow]:
    """All token rows of a file, which must have been made with the tokenizer of this identity.

    Raises:
        ValueError: the file is missing, is none of ours, or comes from another tokenizer.
    """
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; make it with: python -m stages.tokenize") from None
    except pa.ArrowInvalid:
        raise ValueError(f"{path}: not a Parquet file; make it anew with: python -m stages.tokenize") from None
    metadata = file.schema_arrow.metadata or {}
    if _KEY not in metadata:
        raise ValueError(f"{path}: not a token file of this project; make it with: python -m stages.tokenize")
    if json.loads(metadata[_KEY])["tokenizer"] != tokenizer:
        raise ValueError(f"{path}: made with another base model's tokenizer; run: python -m stages.tokenize")
    rows: list[TokenRow] = []
    for batch in file.iter_batches(_ROW_GROUP):
        ids, masks = batch["input_ids"], batch["loss_mask"]
        rows += [
            TokenRow(
                batch["id"][i].as_py(),
                batch["source"][i].as_py(),
                ids[i].values.to_numpy(),
                masks[i].values.to_numpy(zero_copy_only=False),
                batch["trained_bytes"][i].as_py(),
                batch["truncated"][i].as_py(),
            )
            for i in range(len(batch))
        ]
    return rows


def _table(rows: list[TokenRow], schema: pa.Schema) -> pa.Table:
    columns = [[getattr(row, name) for row in rows] for name in schema.names]
    return pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
