"""A data set of the Hugging Face Hub → raw rows, through the optional `datasets` library.

It asks the network only for a data set that is not in the library's cache yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stages.readers.columnar import without_nulls
from stages.readers.rows import BadRow, RawRow


def load(name: str) -> dict[str, Any]:
    """Split name → rows of a data set given as `org/name`, or `org/name@revision`.

    Raises:
        ValueError: the library is not installed, or the data set cannot be had.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"prepare.dataset: {name} needs the datasets library; install it with: pip install 'datasets>=4'"
        ) from None
    repository, _, revision = name.partition("@")
    try:
        found = datasets.load_dataset(repository, revision=revision or None)
    # The library and what it stands on raise a score of types, from network errors to the data set's own.
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"prepare.dataset: {name} cannot be loaded ({first}); check its name and the network"
        ) from None
    return dict(found) if isinstance(found, Mapping) else {"train": found}


def read_split(place: str, rows: Any) -> Iterator[RawRow | BadRow]:
    """The rows of one split, at `org/name/split:row`; the library keeps them as Arrow."""
    for number, fields in enumerate(rows, start=1):
        yield RawRow(f"{place}:{number}", {name: without_nulls(value) for name, value in fields.items()})
