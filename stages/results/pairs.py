"""Two runs on the rows that they have in common: the paired difference in loss, and each row's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import stdtrit

from stages.results import words
from stages.results.intervals import LEVEL, Estimate, Units

COLUMNS = ("id", "source", "group", "tokens", "bytes", "adapter_loss")
SAME = 1e-5  # nats a token: below this two losses of a row are equal but for rounding


@dataclass(frozen=True)
class RowPair:
    """A row's loss in two runs, in nats a token."""

    id: str
    source: str
    before: float
    after: float


@dataclass(frozen=True)
class Comparison:
    """The difference of a run from an earlier one, and what has to be said of it."""

    difference: Estimate
    rows: int
    better: int
    worse: int
    unit: str  # of the difference: loss or bits per byte
    sentence: str
    notes: tuple[str, ...]
    pairs: tuple[RowPair, ...]  # the largest gain first
    is_one_recipe: bool = False  # only the seed differs

    @property
    def verdict(self) -> str:
        """One word, or three."""
        if self.is_one_recipe:
            return "another seed"
        if self.difference.is_noise:
            return "within noise"
        return "better" if self.difference.value < 0 else "worse"

    def best(self, count: int) -> list[RowPair]:
        """The rows whose loss fell most."""
        return [pair for pair in self.pairs[:count] if pair.after < pair.before - SAME]

    def worst(self, count: int) -> list[RowPair]:
        """The rows whose loss rose most, the worst first."""
        return [pair for pair in self.pairs[::-1][:count] if pair.after > pair.before + SAME]


def seed_noise(differences: Sequence[float], *, level: float = LEVEL) -> float:
    """The half width of the interval of a difference that another seed alone makes, of some such differences.

    Each is taken as normal around 0 with a spread that they tell: so few of them make the interval wide (Student's t).
    """
    count = len(differences)
    spread = math.sqrt(sum(difference**2 for difference in differences) / count)
    return spread * float(stdtrit(count, (1 + level) / 2))


def with_seed_noise(found: Comparison, half: float) -> Comparison:
    """The comparison with the chance of training in its interval, beside that of the test rows."""
    difference = found.difference.widened(half)
    sentence = words.sentence(difference, better=found.better, worse=found.worse, rows=found.rows, name=found.unit)
    return replace(found, difference=difference, sentence=sentence)


def of_another_seed(found: Comparison) -> Comparison:
    """The comparison of two runs of one recipe: whatever their difference, it says nothing of the recipe."""
    line = f"better on {found.better:,} of {found.rows:,} rows; {found.unit} {words.signed(found.difference)}"
    return replace(found, sentence=f"within noise, for only the seed differs: {line}", is_one_recipe=True)


def units_of(groups: Sequence[str | None], *, level: float = LEVEL) -> tuple[Units, str]:
    """The units that rows are drawn by, and their name: groups if the rows have any, or rows."""
    # A row without a group is one by itself.
    units = Units([("row", i) if name is None else ("group", name) for i, name in enumerate(groups)], level=level)
    return units, "group" if any(groups) else "row"


def counts(gains: Any) -> tuple[int, int]:
    """How many rows got better and worse, of their gains in nats a token."""
    return int((gains > SAME).sum()), int((gains < -SAME).sum())


def compare(
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    *,
    names: tuple[str, str],
    level: float = LEVEL,
) -> Comparison:
    """Compare two runs' rows, which have `COLUMNS`; where tokenizers differ, by bits per byte.

    Raises:
        ValueError: they have no row in common.
    """
    earlier, later = _keyed(before), _keyed(after)
    common = [key for key in earlier if key in later]
    if not common:
        raise ValueError(
            f"{names[0]} and {names[1]} have no test row in common; compare runs on the same data and split "
            "(prepare.seed, prepare.test_fraction)"
        )
    old, new = [earlier[key] for key in common], [later[key] for key in common]
    units, unit_name = units_of([row["group"] for row in old], level=level)
    losses = [np.array([row["adapter_loss"] for row in rows]) for rows in (old, new)]
    tokens = [np.array([row["tokens"] for row in rows]) for rows in (old, new)]
    same_tokens = bool((tokens[0] == tokens[1]).all())
    name = "loss" if same_tokens else "bits per byte"
    sizes = tokens[0] if same_tokens else np.array([row["bytes"] for row in old]) * math.log(2)
    difference = units.difference(losses[0], losses[1], sizes)
    better, worse = counts((losses[0] - losses[1]) / sizes)
    notes = []
    left_out = len(before) + len(after) - 2 * len(common)
    if left_out:
        notes.append(f"{len(common):,} test rows are in both; {left_out:,} are in one alone, and left out")
    if not same_tokens:
        notes.append("the tokenizers differ: compared by bits per byte")
    if not difference.is_noise and (
        line := words.rows_needed(units.needed(losses[0], losses[1], sizes), units.count, unit_name)
    ):
        notes.append(line)
    pairs = [
        RowPair(row["id"], row["source"], float(losses[0][i] / sizes[i]), float(losses[1][i] / sizes[i]))
        for i, row in enumerate(old)
    ]
    return Comparison(
        difference,
        len(common),
        better,
        worse,
        name,
        words.sentence(difference, better=better, worse=worse, rows=len(common), name=name),
        tuple(notes),
        tuple(sorted(pairs, key=lambda pair: pair.after - pair.before)),
    )


def _keyed(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Mapping[str, Any]]:
    """Rows by their id and, of rows that are alike, their number."""
    seen: Counter[str] = Counter()
    keyed = {}
    for row in rows:
        keyed[row["id"], seen[row["id"]]] = row
        seen[row["id"]] += 1
    return keyed
