"""Raw rows of a source → rows that may be used, each with the point that decides its split, or why they are not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stages.corpus import split
from stages.params.schema import Prepare
from stages.prepared.row import row_id, text_id
from stages.readers.find import Source
from stages.readers.rows import BadRow, RawRow
from stages.schemas import normalize
from stages.schemas.content import Content, content_text
from stages.schemas.schemas import Schema, Schemas
from stages.schemas.text import DroppedError, EmptyError


@dataclass(frozen=True, slots=True)
class Row:
    """A row in its canonical form."""

    place: str
    content: Content
    text: str
    id: str
    point: int
    normalized: bool  # its characters changed
    schema: str
    unread: tuple[str, ...]  # columns and fields of turns
    group: str | None = None
    carried: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that is not used: the reason in the ledger and, of a bad row, its place with what is wrong."""

    reason: str
    message: str = ""


class Intake:
    """Raw rows → rows, under the `prepare` section of params.yaml."""

    def __init__(self, options: Prepare) -> None:
        self._options = options
        self._schemas = Schemas(
            options.template, options.columns, preferences=options.preferences, labels=options.labels
        )

    def check_first(self, source: Source) -> None:
        """Raise ValueError if a source's first row is bad: before any work is spent on the other sources."""
        raw = next(source.rows())
        if isinstance(raw, BadRow):
            raise ValueError(str(raw))
        try:
            self._schemas.detect(self._schemas.row(raw.fields))
        except DroppedError:
            return
        except ValueError as error:
            raise ValueError(f"{raw.place}: {_what(error)}") from None

    def rows(self, source: Source, advance: Callable[[int], None]) -> Iterator[Row | Dropped]:
        """Read each row of a source, used or dropped. The first row tells the schema of all."""
        schema: Schema | None = None
        for raw in source.rows(advance):
            if isinstance(raw, BadRow):
                yield Dropped("bad", str(raw))
                continue
            try:
                fields = self._schemas.row(raw.fields)
                schema = schema or self._schemas.detect(fields)
                row: Row | Dropped = self._row(raw, fields, schema)
            except DroppedError as error:
                row = Dropped("missing" if self._is_missing(raw, error) else error.reason)
            except (ValueError, TypeError, RecursionError) as error:
                row = Dropped("bad", f"{raw.place}: {_what(error)}")
            yield row

    def _row(self, raw: RawRow, fields: Mapping[str, Any], schema: Schema) -> Row:
        reading = self._schemas.read(fields, schema)
        content = normalize.normalized(reading.content, self._options.normalize)
        text = content_text(content)
        options = self._options
        group = None if options.group_by is None else _group(fields, options.group_by)
        known = {options.group_by, *options.carry}
        return Row(
            raw.place,
            content,
            text,
            id=row_id(text, content.get("prompt")),
            # By the text alone: rows that only part it elsewhere stay in one split.
            point=split.point(text_id(text) if group is None else f"group:{group}", seed=options.seed),
            normalized=content is not reading.content and content != reading.content,
            schema=schema.name,
            unread=tuple(name for name in reading.unread if name not in known),
            group=group,
            carried={name: _carried(raw.fields, name) for name in options.carry} or None,
        )

    def _is_missing(self, raw: RawRow, error: DroppedError) -> bool:
        """True if a row is empty for a cell that spells a missing value."""
        column = error.column if isinstance(error, EmptyError) else None
        return column is not None and self._options.columns.get(column, column) in raw.missing


def _what(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "holds half of a surrogate pair (\\udXXX), which is no character; correct the row"
    if isinstance(error, RecursionError):
        return "is nested too deep; correct the row"
    if isinstance(error, TypeError):  # dates, bytes and such in tools and arguments
        return f"holds what JSON cannot ({error}); convert it to text"
    return str(error) if ";" in str(error) else f"{error}; correct the row or map the columns in prepare.columns"


def _group(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str | int):
        raise ValueError(f"has no text or whole number in {name!r}, which prepare.group_by names; correct the row")
    return str(value)


def _carried(fields: Mapping[str, Any], name: str) -> str:
    """A column's value as text; empty where a row has none."""
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise ValueError(f"has no text or number in {name!r}, which prepare.carry names; correct the row")
