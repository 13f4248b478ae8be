"""Sources of raw rows → train, valid and test.jsonl, cleaned, without duplicates, every row in the ledger.

Rows pass one at a time; what stays in memory is some 120 bytes a row, to know its duplicates by. Files that are made
for a held-out split come first, so that a training row which stands there too is noticed when it comes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from stages.corpus import duplicates, split
from stages.files.outputs import write_json
from stages.prepared.ledger import Ledger
from stages.prepared.row import PreparedRow, row_id
from stages.prepared.splits import SPLITS
from stages.readers.find import Source
from stages.readers.rows import BadRow, RawRow
from stages.schemas import normalize
from stages.schemas.content import content_text
from stages.schemas.schemas import Shape, Shapes
from stages.schemas.template import EmptyError

REASONS = ("bad", "empty", "too_long", "duplicate", "normalized_duplicate", "leaked")
COUNTED = ("characters", "normalized", "control_characters", "near_duplicates")
SOURCES_FILE = "sources.json"
_POOL = "pool"  # rows whose split is decided here; they count as train's until they are moved


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The `prepare` section of params.yaml."""

    seed: int
    columns: Mapping[str, str]
    template: str | None
    valid_fraction: float | None
    valid_rows: int | None
    test_fraction: float | None
    test_rows: int | None
    group_by: str | None
    normalize: normalize.Form | None
    duplicates: Literal["keep", "exact", "normalized"]
    leaks: Literal["drop", "error"]
    near_duplicates: float | None
    max_chars: int | None
    on_bad_row: Literal["error", "skip"]


@dataclass(frozen=True)
class Report:
    """The ledger; each source's shape and rows; the first pairs of rows that resemble each other."""

    ledger: Ledger
    shapes: dict[str, str]
    near_pairs: list[tuple[str, str]]


def write_corpus(folder: Path, sources: list[Source], recipe: Recipe, advance: Callable[[int], None]) -> Report:
    """Write the splits of `sources` into a new folder, and sources.json, which says what they were made of.

    Raises:
        ValueError: a bad row (unless they are skipped), a leak that is an error, or a split without rows.
    """
    corpus = _Corpus(recipe, held_out={s.split for s in sources if s.split in ("valid", "test")})
    if recipe.on_bad_row == "error":
        for source in sources:
            corpus.check_first(source)
    folder.mkdir()
    with ExitStack() as stack:
        for name in (*SPLITS, _POOL):
            corpus.files[name] = stack.enter_context((folder / f"{name}.jsonl").open("w", encoding="utf-8", newline=""))
        for origin in ("test", "valid", _POOL):
            for source in sources:
                if corpus.origin(source) == origin:
                    corpus.take(source, advance)
        corpus.files[_POOL].close()
        corpus.part_pool(folder / f"{_POOL}.jsonl")
    (folder / f"{_POOL}.jsonl").unlink()
    corpus.refuse_empty()
    made_of = {s.name: {"sha256": s.fingerprint(), "shape": corpus.shapes_of.get(s.name, "none")} for s in sources}
    rows = {name: corpus.ledger.figures(name)["rows_used"] for name in SPLITS}
    write_json(folder / SOURCES_FILE, {"rows": rows, "sources": made_of})
    return Report(corpus.ledger, corpus.shapes_of, corpus.near_pairs)


class _Corpus:
    def __init__(self, recipe: Recipe, held_out: set[str | None]) -> None:
        self.recipe, self.held_out = recipe, held_out
        self.ledger = Ledger(REASONS, COUNTED)
        self.shapes = Shapes(recipe.template, recipe.columns)
        self.shapes_of: dict[str, str] = {}
        self.near_pairs: list[tuple[str, str]] = []
        self.files: dict[str, IO[str]] = {}
        self._seen = duplicates.Seen(recipe.duplicates)
        self._near = duplicates.NearDuplicates(recipe.near_duplicates) if recipe.near_duplicates is not None else None
        self._points, self._counts = array("Q"), {name: array("I") for name in COUNTED}  # of the pool's rows
        # A held-out split that files were made for takes no other rows.
        self._fractions = {f"{name}_fraction": self._wanted(name, "fraction") for name in ("valid", "test")}
        self._rows = {name: int(self._wanted(name, "rows")) for name in ("valid", "test")}
        self._by_count = any(self._rows.values())

    def _wanted(self, name: str, unit: str) -> float:
        return 0 if name in self.held_out else (getattr(self.recipe, f"{name}_{unit}") or 0)

    def origin(self, source: Source) -> str:
        return source.split if source.split in ("valid", "test") else _POOL

    def check_first(self, source: Source) -> None:
        """Raise ValueError if a source's first row is bad: before any work is spent on the other sources."""
        row = next(source.rows())
        if isinstance(row, BadRow):
            raise ValueError(str(row))
        try:
            self.shapes.detect(self.shapes.renamed(row.fields))
        except ValueError as error:
            raise ValueError(f"{row.place}: {_what(error)}") from None

    def take(self, source: Source, advance: Callable[[int], None]) -> None:
        """Put each row of a source where it belongs."""
        origin = self.origin(source)
        shape: Shape | None = None
        for row in source.rows(advance):
            reason = str(row) if isinstance(row, BadRow) else None
            if isinstance(row, RawRow):
                try:
                    fields = self.shapes.renamed(row.fields)
                    shape = shape or self.shapes.detect(fields)
                    self.shapes_of[source.name] = shape.name
                    self._place(row.place, fields, shape, origin)
                except EmptyError:
                    self.ledger.dropped(_split(origin), "empty")
                except UnicodeEncodeError:
                    reason = (
                        f"{row.place}: holds half of a surrogate pair (\\udXXX), which is no character; mend the row"
                    )
                except _LeakError:
                    raise
                except (ValueError, TypeError, RecursionError) as error:
                    reason = f"{row.place}: {_what(error)}"
            if reason is not None:
                if self.recipe.on_bad_row == "error":
                    raise ValueError(reason)
                self.ledger.dropped(_split(origin), "bad")

    def _place(self, place: str, fields: dict[str, Any], shape: Shape, origin: str) -> None:
        raw = self.shapes.content(fields, shape)
        content = normalize.normalized(raw, self.recipe.normalize)
        text = content_text(content)
        identity = row_id(text)
        counts = {
            "characters": len(text),
            "normalized": int(content is not raw and content != raw),
            "control_characters": int(duplicates.has_control(content)),
            "near_duplicates": 0,
        }
        key = identity if self.recipe.group_by is None else f"group:{_group(fields, self.recipe.group_by)}"
        point = split.point(key, seed=self.recipe.seed)
        goal = origin if origin != _POOL or self._by_count else split.assign(point, **self._fractions)
        if self.recipe.max_chars is not None and len(text) > self.recipe.max_chars:
            self.ledger.dropped(_split(goal), "too_long")
            return
        verdict = self._seen.judge(text, _split(goal))
        if verdict == "leaked" and self.recipe.leaks == "error":
            raise _LeakError(f"{place}: stands in another split too; remove it from one, or set prepare.leaks: drop")
        if verdict != "new":
            self.ledger.dropped(_split(goal), verdict)
            return
        if self._near and (earlier := self._near.earlier(text, place)):
            counts["near_duplicates"] = 1
            self.near_pairs.append((place, earlier))
        self.files[goal].write(PreparedRow(identity, place, **content).line())
        self.ledger.used(_split(goal), **counts)
        if goal == _POOL:
            self._points.append(point)
            for name, column in self._counts.items():
                column.append(counts[name])

    def part_pool(self, pool: Path) -> None:
        """Deal out the rows whose split is a matter of counts, once all are known."""
        if not self._by_count:
            return
        points = np.frombuffer(self._points, dtype=np.uint64)
        wanted = {
            name: self._rows[name] or round(self._fractions[f"{name}_fraction"] * len(points))
            for name in ("valid", "test")
        }
        last = split.borders(points, **wanted)
        with pool.open(encoding="utf-8", newline="") as lines:
            for line, point, *counts in zip(lines, self._points, *self._counts.values(), strict=True):
                goal = "test" if point <= last["test"] else "valid" if point <= last["valid"] else "train"
                self.files[goal].write(line)
                self.ledger.move("train", goal, **dict(zip(COUNTED, counts, strict=True)))

    def refuse_empty(self) -> None:
        total = self.ledger.figures("all")["rows_used"]
        for name in SPLITS:
            wanted = name == "train" or name in self.held_out or self._wanted(name, "fraction") or self._rows[name]
            if wanted and not self.ledger.splits[name]["rows_used"]:
                mend = (
                    f"raise prepare.{name}_fraction (or set it to null, and prepare.{name}_rows to 1 or more)"
                    if name != "train"
                    else "lower the other splits' shares"
                )
                raise ValueError(f"the {name} split got none of the {total} rows; add rows or {mend}")


class _LeakError(ValueError):
    """Not a bad row: skipping it is what `leaks: drop` is for."""


def _split(name: str) -> str:
    return "train" if name == _POOL else name


def _what(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "is nested too deep; mend the row"
    if isinstance(error, TypeError):  # dates, bytes and such in a conversation's further fields
        return f"holds what JSON cannot ({error}); convert it to text"
    return str(error) if ";" in str(error) else f"{error}; mend the row or map the columns in prepare.columns"


def _group(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str | int):
        raise ValueError(f"has no text or whole number in {name!r}, which prepare.group_by names; mend the row")
    return str(value)
