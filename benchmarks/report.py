"""The figures of a run of `benchmarks.bench` as Markdown, as a drawing, and held against the targets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import drawing
from benchmarks.entries import Entry, disagreement, median, of, ours, spread
from benchmarks.targets import TITLES, targets

SWEEP = "sweep.json"


def write(found: Entry, out: Path) -> list[Path]:
    """bench.json, bench.md and bench.svg."""
    out.mkdir(parents=True, exist_ok=True)
    sweep = out / SWEEP
    if sweep.exists():
        found["sweep"] = json.loads(sweep.read_text())
    contents = {
        "bench.json": json.dumps(_without_paths(found), indent=1) + "\n",
        "bench.md": markdown(found),
        "bench.svg": drawing.draw({TITLES[kind]: _bars(entries) for kind, entries in found["kinds"].items()}),
    }
    for name, text in contents.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in contents]


def _without_paths(value: Any) -> Any:
    """The figures without the folders that the adapters were in."""
    if isinstance(value, dict):
        return {key: _without_paths(each) for key, each in value.items() if key != "adapter"}
    return [_without_paths(each) for each in value] if isinstance(value, list) else value


def _bars(entries: dict[str, Entry]) -> list[tuple[str, float, float, float]]:
    return [(name, *spread(entry, "second_epoch")) for name, entry in entries.items()]


def markdown(found: Entry) -> str:
    """All tables."""
    parts = [_head(found)]
    for kind, entries in found["kinds"].items():
        parts += [f"## {TITLES[kind]}", _speeds(entries), _limit(found, kind), _losses(entries)]
    parts += ["## Targets", _table(("target", "measured", ""), targets(found))]
    if "growth" in found:
        parts += ["## Growth", _growth(found["growth"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(found: Entry) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    answers, whole = found["batches"]["answers"], found["batches"]["whole"]
    return (
        f"{found['machine']}. {versions}.\n\n"
        f"Rows of {found['data']}: {whole['tokens']:,.0f} tokens an update on the average, of which the whole-text "
        f"loss trains on {whole['trained_tokens']:,.0f} and the answer-only loss on {answers['trained_tokens']:,.0f}; "
        f"the longest row has {whole['longest']}. {found['updates']} updates, the second half of them on the rows of "
        f"the first. Medians of {found['rounds']} rounds, lowest to highest in brackets; (a) was measured once, in one "
        "update on the four shortest rows of the data."
    )


def _speeds(entries: dict[str, Entry]) -> str:
    header = (
        "",
        "tokens/s, first epoch",
        "second epoch on",
        "× (b)",
        "peak MB",
        "first update, s",
        "evaluation, tokens/s",
    )
    reference = of(entries, "(b)")
    lines = []
    for name, entry in entries.items():
        ratio = median(entry, "second_epoch") / median(reference, "second_epoch") if reference else 0.0
        cached = _shown(entry, "cached_evaluation")
        lines.append(
            (
                name,
                _shown(entry, "first_epoch"),
                _shown(entry, "second_epoch"),
                f"{ratio:.2f}" if reference else "-",
                _shown(entry, "peak_memory_bytes", 1e-6),
                _shown(entry, "seconds_to_first_update", digits=1),
                _shown(entry, "evaluation") + (f", then {cached}" if cached != "-" else ""),
            )
        )
    return _table(header, lines)


def _limit(found: Entry, kind: str) -> str:
    limit = found["limit"][kind]
    text = (
        f"The limit: {limit['flops_per_token'] / 1e6:,.0f} MFLOP of matrix products remain a token; at the "
        f"{limit['gflops_per_second']:,.0f} GFLOP/s that the BLAS reaches on these shapes, "
        f"{limit['tokens_per_second']:,.0f} tokens/s."
    )
    if reached := ours(found["kinds"][kind]):
        text += f" Reached: {median(reached, 'second_epoch') / limit['tokens_per_second']:.0%}."
    return text


def _losses(entries: dict[str, Entry]) -> str:
    plain = of(entries, "(d)")
    judged = [(name, entry) for name, entry in entries.items() if "loss" in entry]
    if not judged or not plain:
        return ""
    lines = [("untrained", f"{plain['untrained']:.5f}", "", "")]
    for name, entry in judged:
        lines.append(
            (
                name,
                f"{entry['loss']:.5f}",
                f"{abs(entry['loss'] / plain['loss'] - 1):.1e}",
                f"{disagreement(entry, plain):.1e}" if name[1] in "de" else "",
            )
        )
    return _table(
        ("", "held-out loss after the updates", "from (d), relative", "training losses from (d), at most"), lines
    )


def _growth(points: Sequence[Entry]) -> str:
    names = list(points[0]["figures"]) if points else []
    header = ["axis", "value", *(f"{name}: {what}" for name in names for what in ("tokens/s", "peak MB"))]
    lines = []
    for point in points:
        figures = [point["figures"][name] for name in names]
        cells = [f"{each['second_epoch']:,.0f} {each['peak_memory_bytes'] / 1e6:,.0f}".split() for each in figures]
        lines.append((point["axis"], f"{point['shape'][point['axis']]:,}", *(cell for pair in cells for cell in pair)))
    return _table(header, lines)


def _shown(entry: Entry, key: str, factor: float = 1.0, digits: int = 0) -> str:
    if entry["runs"][0][key] is None:
        return "-"
    middle, low, high = (f"{value * factor:,.{digits}f}" for value in spread(entry, key))
    return middle if len(entry["runs"]) == 1 else f"{middle} ({low}–{high})"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
