"""The number of tokens that a base model's embedding knows, read from the headers of its safetensors files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# An embedding's name ends in one of these, whatever the architecture; quantised or not, it has a row for each token.
_EMBEDDINGS = (
    "embed_tokens.weight", "embeddings.weight", "embedding.weight", "tok_embeddings.weight", "embed_in.weight",
    "word_embeddings.weight", "wte.weight",
)  # fmt: skip
_LONGEST_HEADER = 100_000_000  # bytes: what safetensors itself allows


def embedding_rows(paths: Iterable[Path], config: dict[str, Any]) -> int | None:
    """Rows of the token embedding: as the weights have it, or else the config; None if neither tells."""
    rows = [shape[0] for path in paths for name, shape in _shapes(path) if name.endswith(_EMBEDDINGS) and shape]
    if rows:
        return max(rows)  # other embeddings, of positions or images, are smaller
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return size if isinstance(size, int) else None


def _shapes(path: Path) -> Iterator[tuple[str, list[int]]]:
    """Tensors' names and shapes; none of a file that is no safetensors, which whoever loads it refuses."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            return
        try:
            header = json.loads(file.read(length))
            yield from [(name, about["shape"]) for name, about in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return
