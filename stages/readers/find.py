"""Files, folders and data sets of any supported kind → sources of raw rows, with the split that their names tell."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stages.files.hashes import sha256
from stages.readers import hub
from stages.readers.columnar import read_arrow, read_parquet, saved_files
from stages.readers.delimited import read_delimited
from stages.readers.jsonl import read_json, read_jsonl
from stages.readers.rows import Advance, BadRow, RawRow, nothing, suffixes

Reader = Callable[[Path, Advance], Iterator[RawRow | BadRow]]

_READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": functools.partial(read_delimited, delimiter=","),
    ".tsv": functools.partial(read_delimited, delimiter="\t"),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
_PACKED = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # formats that may be compressed as a whole
KINDS = ".jsonl, .json, .csv, .tsv (each also .gz or .zst), .parquet, .arrow, or a dataset saved to disk"

_SPLIT_NAMES = {
    "train": "train", "training": "train",
    "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
    "test": "test",
}  # fmt: skip
# train.jsonl, train-00000-of-00003.parquet, train_1.csv
_SPLIT_FILE = re.compile(rf"({'|'.join(_SPLIT_NAMES)})([-_.]\d.*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One file, or one split of a Hub data set: its name, the split it was made for, its size in bytes."""

    name: str
    split: str | None
    size: int
    read: Callable[[Advance], Iterator[RawRow | BadRow]]
    path: Path | None = None

    def rows(self, advance: Advance = nothing) -> Iterator[RawRow | BadRow]:
        """The rows; a source that holds none yields one BadRow."""
        empty = True
        for row in self.read(advance):
            empty = False
            yield row
        if empty:
            yield BadRow(f"{self.name}:1", "holds no rows; add some or remove the file")

    def fingerprint(self) -> str:
        """Hex sha256 of a file's bytes, or of a data set's name and split."""
        return sha256(self.path) if self.path else hashlib.sha256(self.name.encode()).hexdigest()


def find(paths: Iterable[Path]) -> tuple[list[Source], list[Path]]:
    """The sources among `paths` and in the folders among them, in a fixed order; and the files passed over.

    Raises:
        ValueError: a path that does not exist or cannot be read, or no source at all.
    """
    sources: list[Source] = []
    ignored: list[Path] = []
    paths = list(paths)
    for path in paths:
        if path.is_dir():
            _walk(path, _split_of(path.name), sources, ignored)
        elif not path.exists():
            raise ValueError(f"{path}: no such file or folder; put your rows there as {KINDS}")
        elif not _readable(path):
            raise ValueError(f"{path}: not a kind of file that is known here; bring {KINDS}")
        else:
            sources.append(_file(path, None))
    if not sources:
        raise ValueError(f"{', '.join(map(str, paths))}: no rows there; bring {KINDS}")
    return sources, ignored


def find_dataset(name: str) -> list[Source]:
    """The splits of a Hub data set, as sources.

    Raises:
        ValueError: see `hub.load`.
    """
    return [
        Source(f"{name}/{split}", _split_of(split), 0, functools.partial(_hub_rows, f"{name}/{split}", rows))
        for split, rows in hub.load(name).items()
    ]


def _hub_rows(place: str, rows: object, advance: Advance) -> Iterator[RawRow | BadRow]:
    return hub.read_split(place, rows)


def _walk(folder: Path, split: str | None, sources: list[Source], ignored: list[Path]) -> None:
    """Add what is in a folder; the name of a folder tells the split of what lies in it."""
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        sources += (_file(path, split) for path in saved_files(folder))
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            _walk(path, _split_of(path.name) or split, sources, ignored)
        elif path.name == "dataset_dict.json":
            continue  # names the folders beside it, which are read as the folders they are
        elif _readable(path):
            sources.append(_file(path, split))
        else:
            ignored.append(path)


def _readable(path: Path) -> bool:
    suffix, codec = suffixes(path)
    return suffix in (_PACKED if codec else _READERS)


def _file(path: Path, split: str | None) -> Source:
    stem = path.name.split(".")[0] if suffixes(path)[1] else path.stem
    reader = functools.partial(_READERS[suffixes(path)[0]], path)
    return Source(str(path), _split_of(stem) or split, path.stat().st_size, reader, path)


def _split_of(name: str) -> str | None:
    match = _SPLIT_FILE.fullmatch(name)
    return _SPLIT_NAMES[match[1].lower()] if match else None
