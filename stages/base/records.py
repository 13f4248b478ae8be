"""Records of the folders that hold base models on this machine, kept in the store.

A base model may lie in several folders. A record keeps each file's stamp, so that what was not touched since is not
hashed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stages.base import store
from stages.files.hashes import digest_of
from stages.files.outputs import read_json, write_json

Stamp = tuple[int, ...]


@dataclass(frozen=True)
class Record:
    """A folder that held a base model, its files' stamps at that time, and whether its Python code was counted in."""

    directory: Path
    with_code: bool
    seen: dict[str, Stamp]


def stamp(path: Path) -> Stamp:
    """Size, modification and change time, and inode of a file: one of them changes when its content does."""
    stat = path.stat()
    return (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def write_record(identity: str, record: Record) -> None:
    """Remember a folder of the base model with this identity; what was remembered of the same folder is replaced."""
    directory = str(record.directory.resolve())
    content = {"directory": directory, "with_code": record.with_code, "seen": record.seen}
    write_json(_folder(identity) / f"{digest_of(directory)[:16]}.json", content)


def read_records(identity: str) -> list[Record]:
    """The folders that held a base model, the one last written first; damaged records count as none."""
    found = []
    for path in sorted(_folder(identity).glob("[!.]*.json"), key=lambda path: -path.stat().st_mtime_ns):
        try:
            content = read_json(path, "")
            seen = {name: tuple(numbers) for name, numbers in content["seen"].items()}
            found.append(Record(Path(content["directory"]), bool(content["with_code"]), seen))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def _folder(identity: str) -> Path:
    return store.root() / "bases" / identity
