"""Sources of raw rows → train, valid and test.jsonl, cleaned, without duplicates, every row in the ledger.

Rows pass one at a time; what stays in memory is some 120 bytes a row, to know its duplicates by. Files that are made
for a held-out split come first, so that a training row which stands there too is noticed when it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.corpus import duplicates
from stages.corpus.intake import Dropped, Intake, Row
from stages.corpus.split import Allocation
from stages.corpus.writing import COUNTED, SplitFiles
from stages.files.outputs import write_json
from stages.params.schema import Prepare
from stages.prepared.ledger import Ledger
from stages.prepared.splits import SPLITS
from stages.readers.find import Source

REASONS = (
    "bad", "empty", "missing", "label_false", "too_long", "duplicate", "normalized_duplicate", "leaked",
)  # fmt: skip
SOURCES_FILE = "sources.json"


@dataclass(frozen=True)
class Report:
    """The ledger; of each source, the schema and what nobody reads; the pairs of rows that resemble each other."""

    ledger: Ledger
    schemas: dict[str, str]
    unread: dict[str, list[str]]
    near_pairs: list[tuple[str, str]]


def write_corpus(folder: Path, sources: list[Source], options: Prepare, advance: Callable[[int], None]) -> Report:
    """Write the splits of `sources` into a new folder, and sources.json, which says what they were made of.

    Raises:
        ValueError: a bad row (unless they are skipped), a leak that is an error, or a split without rows.
    """
    intake = Intake(options)
    if options.on_bad_row == "error":
        for source in sources:
            intake.check_first(source)
    provided = {source.split for source in sources if source.split in ("valid", "test")}
    allocation = Allocation.under(options, provided)
    sieve, ledger = _Sieve(options), Ledger(REASONS, (*COUNTED, "unread_columns"))
    schemas: dict[str, str] = {}
    unread: dict[str, list[str]] = {}
    bad: list[str] = []
    carried: set[str] = set()
    folder.mkdir()
    with SplitFiles(folder, ledger) as files:
        for source in _held_out_first(sources):
            home = source.split if source.split in provided else None
            names: dict[str, None] = {}  # in the order in which they occur
            for row in intake.rows(source, advance):
                if isinstance(row, Dropped):
                    if row.message and options.on_bad_row == "error":
                        raise ValueError(row.message)
                    bad += [row.message] if row.message and not bad else []
                    ledger.dropped(home or "train", row.reason)
                    continue
                schemas[source.name] = row.schema
                names.update(dict.fromkeys(row.unread))
                carried.update(name for name, value in (row.carried or {}).items() if value)
                split = home or (None if allocation.by_count else allocation.split_of(row.point))
                if reason := sieve.judge(row, split or "train"):
                    ledger.dropped(split or "train", reason)
                else:
                    files.write(row, split, resembles=sieve.note_resemblance(row))
            unread[source.name] = list(names)
            ledger.add(home or "train", unread_columns=len(names))
        if allocation.by_count:
            files.allocate(allocation)
    if missing := [name for name in options.carry if name not in carried]:
        raise ValueError(f"no row has anything in {missing[0]!r}, which prepare.carry names; correct the name")
    _refuse_empty(ledger, [name for name in SPLITS if name in provided or allocation.wants(name)], bad)
    write_json(folder / SOURCES_FILE, _about(sources, ledger, schemas, unread))
    return Report(ledger, schemas, unread, sieve.near_pairs)


def _held_out_first(sources: Iterable[Source]) -> list[Source]:
    order = {"test": 0, "valid": 1}
    return sorted(sources, key=lambda source: order.get(source.split or "", 2))


def _about(
    sources: Iterable[Source], ledger: Ledger, schemas: dict[str, str], unread: dict[str, list[str]]
) -> dict[str, Any]:
    made_of = {
        source.name: {
            "sha256": source.fingerprint(),
            "schema": schemas.get(source.name, "none"),
            "not_read": unread[source.name],
        }
        for source in sources
    }
    return {"rows": {name: ledger.figures(name)["rows_used"] for name in SPLITS}, "sources": made_of}


class _Sieve:
    """The reasons to drop a row that is good in itself: it is too long, or stands elsewhere too."""

    def __init__(self, options: Prepare) -> None:
        self._options = options
        self._seen = duplicates.Seen(options.duplicates)
        self._near = duplicates.NearDuplicates(options.near_duplicates) if options.near_duplicates is not None else None
        self.near_pairs: list[tuple[str, str]] = []

    def judge(self, row: Row, split: str) -> str | None:
        """The reason to drop a row that is meant for this split, or None. The row is remembered.

        Raises:
            ValueError: it is leaked, and leaks are an error.
        """
        if self._options.max_chars is not None and len(row.text) > self._options.max_chars:
            return "too_long"
        verdict = self._seen.judge(row.content, row.text, split)
        if verdict == "leaked" and self._options.leaks == "error":
            hint = "remove it from one, or set prepare.leaks: drop"
            raise ValueError(f"{row.place}: stands in another split too; {hint}")
        return None if verdict == "new" else verdict

    def note_resemblance(self, row: Row) -> bool:
        """Note the earlier row that this one resembles, and tell if there is one. The row is remembered."""
        earlier = self._near.earlier(row.text, row.place) if self._near else None
        if earlier is not None:
            self.near_pairs.append((row.place, earlier))
        return earlier is not None


def _refuse_empty(ledger: Ledger, wanted: Iterable[str], bad: list[str]) -> None:
    """Raise ValueError if one of the wanted splits has no rows: with the reasons, or what to do."""
    total = ledger.figures("all")
    for name in wanted:
        if ledger.figures(name)["rows_used"]:
            continue
        if total["rows_used"] == 0:
            reasons = ", ".join(
                f"{total[f'dropped_{reason}']} {reason}" for reason in REASONS if total[f"dropped_{reason}"]
            )
            why = f"the first bad one is {bad[0]}" if bad else "correct the rows, or the parameters of prepare"
            raise ValueError(
                f"the {name} split got none of the 0 rows: all {total['rows_in']} were dropped ({reasons}); {why}"
            )
        hint = (
            f"raise prepare.{name}_fraction (or set it to null, and prepare.{name}_rows to 1 or more)"
            if name != "train"
            else "lower the other splits' shares"
        )
        raise ValueError(f"the {name} split got none of the {total['rows_used']} rows; add rows or {hint}")
