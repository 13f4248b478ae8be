"""Raw rows → prompts and completions, conversations or text, split into train, valid and test, every row accounted for.

data/raw → data/prepared/{train,valid,test}.jsonl: `python -m stages.prepare data/raw --out data/prepared`
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stages.cli import console
from stages.files import outputs
from stages.params.loading import load_params
from stages.prepared.splits import SPLITS
from stages.readers import find as readers
from stages.schemas.text import listed

if TYPE_CHECKING:
    from stages.corpus.corpus import Report

_COLUMNS = (*SPLITS, "all")


def prepare(
    raw: Annotated[
        list[Path] | None,
        typer.Argument(help=f"Files, or folders of them: {readers.KINDS}. [default: data/raw]"),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write train, valid and test.jsonl to.")] = Path(
        "data/prepared"
    ),
    metrics: Annotated[Path, typer.Option(help="The headline numbers to write.")] = Path(
        "artifacts/metrics/prepare.json"
    ),
    details: Annotated[Path, typer.Option(help="The ledger to write.")] = Path("artifacts/details/prepare.json"),
    params_file: console.ParamsFile = console.DEFAULT_PARAMS,
    overrides: console.Overrides = None,
) -> None:
    """Read rows of any known schema, clean them, drop duplicates, and write them by split.

    A file or folder called train, valid (validation, dev) or test keeps its split. Elsewhere a row's split follows from
    its own text (or its group) and `prepare.seed`: with fractions, adding rows moves none of the old ones.
    """
    from stages.corpus.corpus import write_corpus

    started = time.perf_counter()
    options = load_params(params_file, overrides or ()).prepare
    raw = raw or [Path("data/raw")]
    outputs.refuse_foreign(out, [*(f"{name}.jsonl" for name in SPLITS), "sources.json"], inputs=raw)
    if options.dataset is not None:
        sources = readers.find_dataset(options.dataset)
    else:
        sources, ignored = readers.find(raw)
        for path in ignored:
            console.say(f"passed over: {path}")
    with outputs.replacing(out) as draft, console.progress("preparing", sum(s.size for s in sources)) as advance:
        report = write_corpus(draft, sources, options, advance)
        ledger = {name: report.ledger.figures(name) for name in _COLUMNS}
    total = ledger["all"]
    outputs.write_json(details, ledger)
    outputs.write_json(metrics, {"rows": total["rows_used"], "dropped": total["rows_in"] - total["rows_used"]})
    _tell(report, ledger, out, time.perf_counter() - started)


def _tell(report: Report, ledger: dict[str, dict[str, int]], out: Path, seconds: float) -> None:
    from stages.corpus.corpus import REASONS

    for name, unread in report.unread.items():
        console.say(f"{name}: {report.schemas.get(name, 'no row is used')}")
        if unread:
            console.say(f"{name}: not read: {listed(unread, limit=len(unread))}")
    shown = [key for key in ledger["all"] if ledger["all"][key] or not key.startswith("dropped_")]
    console.table(
        f"Prepared rows → {out}",
        ("", *_COLUMNS),
        ((key.replace("_", " "), *(ledger[name][key] for name in _COLUMNS)) for key in shown),
    )
    total = ledger["all"]
    dropped = sum(total[f"dropped_{reason}"] for reason in REASONS)
    rate = total["rows_in"] / seconds
    console.say(f"{total['rows_in']:,} rows in = {total['rows_used']:,} used + {dropped:,} dropped; {rate:,.0f} rows/s")
    if total["dropped_missing"]:
        console.say("missing: a cell that spells a missing value (nan, None, NA, …) is empty; in JSON Lines it is text")
    for place, earlier in report.near_pairs[:5]:
        console.say(f"{place} resembles {earlier}")


if __name__ == "__main__":
    console.main(prepare)
