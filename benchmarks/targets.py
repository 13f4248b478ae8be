"""The project's targets, held against a run's figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.entries import Entry, disagreement, median, of, ours

Line = tuple[str, str, str]  # what is asked for, what was measured, met or missed

TITLES = {"answers": "Answer-only loss", "whole": "Whole-text loss"}
# Times as fast as (a), (b) and (c), from the second epoch on.
SPEED = {"answers": {"(a)": 100, "(b)": 3, "(c)": 1.6}, "whole": {"(a)": 60, "(b)": 2, "(c)": 1.1}}
MEMORY = {"(b)": 0.6, "(c)": 0.5}
EVALUATION = 2.0  # times (b)
AGREEMENT = 1e-4  # between plain and every saving, relative


def targets(found: Entry) -> Iterator[Line]:
    """Each target."""
    for kind, entries in found["kinds"].items():
        if reached := ours(entries):
            about = TITLES[kind]
            for line in (*_speed(kind, entries, reached), *_memory(entries, reached), *_evaluation(entries, reached)):
                yield f"{about}: {line[0]}", *line[1:]
            if plain := of(entries, "(d)"):
                yield _agreement(about, entries, plain)
    yield from _length(found.get("growth", []))
    if sweep := found.get("sweep"):
        yield _at_most("second experiment, of the first one's time: 0.5", sweep["second"] / sweep["first"], 0.5)
        yield _at_most("six points, of six runs of (b): 0.333", sweep["ours"] / sweep["theirs"], 1 / 3)


def _speed(kind: str, entries: dict[str, Entry], reached: Entry) -> Iterator[Line]:
    for letter, wanted in SPEED[kind].items():
        if other := of(entries, letter):
            ratio = median(reached, "second_epoch") / median(other, "second_epoch")
            yield _at_least(f"speed from the second epoch on, {wanted:g} × {letter}", ratio, wanted)


def _memory(entries: dict[str, Entry], reached: Entry) -> Iterator[Line]:
    for letter, most in MEMORY.items():
        if other := of(entries, letter):
            ratio = median(reached, "peak_memory_bytes") / median(other, "peak_memory_bytes")
            yield _at_most(f"peak memory, {most:g} × {letter}", ratio, most)


def _evaluation(entries: dict[str, Entry], reached: Entry) -> Iterator[Line]:
    if other := of(entries, "(b)"):
        for key in ("evaluation", "cached_evaluation"):
            ratio = median(reached, key) / median(other, "evaluation")
            yield _at_least(f"speed of {key.replace('_', ' ')}, {EVALUATION:g} × (b)", ratio, EVALUATION)


def _agreement(about: str, entries: dict[str, Entry], plain: Entry) -> Line:
    rest = [entry for name, entry in entries.items() if name.startswith("(e)") and entry["same_updates"]]
    worst = max(max(disagreement(entry, plain), abs(entry["loss"] / plain["loss"] - 1)) for entry in rest)
    verdict = "met" if worst <= AGREEMENT else "missed"
    return f"{about}: losses with each saving and without agree to {AGREEMENT:g}", f"{worst:.1e}", verdict


def _length(points: Sequence[Entry]) -> Iterator[Line]:
    lengths = {point["shape"]["length"]: point for point in points if point["axis"] == "length"}
    for length, point in lengths.items():
        if longer := lengths.get(2 * length):
            short, long = (_beyond_weights(each) for each in (point, longer))
            yield _at_most(f"memory beyond the weights, {length} → {2 * length} tokens a row: 2 ×", long / short, 2)


def _beyond_weights(point: Entry) -> int:
    ours = [figures for name, figures in point["figures"].items() if name.startswith("(e)")]
    return int(ours[-1]["peak_memory_bytes"] - point["weights_bytes"])


def _at_least(what: str, ratio: float, wanted: float) -> Line:
    return f"{what} at least", f"{ratio:.2f} ×", "met" if ratio >= wanted else "missed"


def _at_most(what: str, ratio: float, wanted: float) -> Line:
    return f"{what} at most", f"{ratio:.2f} ×", "met" if ratio <= wanted else "missed"
