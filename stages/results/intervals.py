"""Numbers with their interval, by bootstrap over rows or over groups of rows.

Each number here is a ratio of two sums over rows: nats to tokens (loss), correct tokens to tokens (accuracy), scores to
rows (a mean). A unit is what the data were drawn by: a row, or a group of rows that belong together. Units are drawn
with replacement, and the ratio is formed of each such sample.

- The interval is the bootstrap-t: each sample's distance from the number is counted in standard errors of its own,
  which keeps 95% for skewed rows too. It is cut to the range of the units' own ratios. Source: Efron and Tibshirani,
  "An Introduction to the Bootstrap" (1993), section 12.5.
- Where the values are so coarse that samples without any spread occur (an exact match in 2 of 24 rows), it is the
  expanded percentile interval: Hesterberg, "What Teachers Should Know about the Bootstrap" (arXiv 1411.5279),
  section 4.3.
- A share of rows has the exact interval of Clopper and Pearson.
- With thousands of units the normal distribution says the same, and at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import betaincinv, ndtr, ndtri, stdtrit

LEVEL = 0.95
_SAMPLES = 2000
_MOST_UNITS = 2000  # more need no samples
_COARSE = 0.005  # share of samples without spread from which on values count as coarse
Array = np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its interval, which are None where a single unit gives no idea of the spread."""

    value: float
    low: float | None
    high: float | None

    def mapped(self, function: Callable[[float], float]) -> Estimate:
        """The estimate of a rising function of the number."""
        low, high = (None if end is None else function(end) for end in (self.low, self.high))
        return Estimate(function(self.value), low, high)

    def widened(self, half: float) -> Estimate:
        """The estimate with another, independent doubt added, which has this half width."""
        if self.low is None or self.high is None:
            return self
        return Estimate(
            self.value,
            self.value - math.hypot(self.value - self.low, half),
            self.value + math.hypot(self.high - self.value, half),
        )

    @property
    def is_noise(self) -> bool:
        """True if the interval of a difference holds 0, or there is none."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


class Units:
    """The units that rows are drawn by, and the samples of them: the same for every number, so that they pair up."""

    def __init__(self, groups: Sequence[object], *, level: float = LEVEL, seed: int = 0) -> None:
        names = {name: index for index, name in enumerate(dict.fromkeys(groups))}
        self._unit_of_row = np.array([names[name] for name in groups], dtype=np.int64)
        self.count = len(names)
        self.level = level
        self._seed = seed

    @classmethod
    def of_rows(cls, count: int, *, level: float = LEVEL, seed: int = 0) -> Units:
        """Each row by itself."""
        return cls(range(count), level=level, seed=seed)

    def ratio(self, numerators: Array, denominators: Array | None = None, *, is_share: bool = False) -> Estimate:
        """The ratio of two sums over rows; without denominators, the mean over rows.

        `is_share`: each value is 0 or 1, so that even rows that are all alike leave a doubt.
        """
        tops, bottoms = self._sums(numerators), self._sums(_ones(numerators, denominators))
        value = float(tops.sum() / bottoms.sum())
        if is_share and self.count == len(self._unit_of_row):
            return self._estimate(value, *self._share(int(tops.sum())))
        return self._estimate(value, *self._interval(tops, bottoms))

    def difference(
        self, before: Array, after: Array, denominators: Array | None = None, *, is_share: bool = False
    ) -> Estimate:
        """The ratio after minus the ratio before, of the same rows."""
        tops = self._sums(np.asarray(after, np.float64) - np.asarray(before, np.float64))
        bottoms = self._sums(_ones(before, denominators))
        if is_share and not tops.any():
            rare = self._share(0)[1]  # what none of these units shows may still be this common
            return self._estimate(0.0, -rare, rare)
        return self._estimate(float(tops.sum() / bottoms.sum()), *self._interval(tops, bottoms))

    def needed(self, before: Array, after: Array, denominators: Array | None = None) -> int | None:
        """The number of units with which a difference half as large would be seen: power 80%, two-sided test at 5%."""
        tops = self._sums(np.asarray(after, np.float64) - np.asarray(before, np.float64))
        bottoms = self._sums(_ones(before, denominators))
        value = float(tops.sum() / bottoms.sum())
        if self.count < 2 or not value:
            return None
        spread = _error(tops, bottoms) * math.sqrt(self.count)
        return max(2, math.ceil(((ndtri(0.975) + ndtri(0.8)) * spread / (value / 2)) ** 2))

    def _sums(self, values: Array) -> Array:
        """The sum over each unit's rows."""
        return np.bincount(self._unit_of_row, weights=np.asarray(values, np.float64), minlength=self.count)

    def _estimate(self, value: float, low: float, high: float) -> Estimate:
        return Estimate(value, None, None) if self.count < 2 else Estimate(value, low, high)

    def _share(self, count: int) -> tuple[float, float]:
        """The interval of a share of units that `count` of them show (Clopper and Pearson)."""
        tail, rest = (1 - self.level) / 2, self.count - count
        low = float(betaincinv(count, rest + 1, tail)) if count else 0.0
        return low, float(betaincinv(count + 1, rest, 1 - tail)) if rest else 1.0

    @cached_property
    def _counts(self) -> Array:
        """The number of times that each sample holds each unit, (samples, units)."""
        rng = np.random.default_rng(self._seed)
        return rng.multinomial(self.count, np.full(self.count, 1 / self.count), size=_SAMPLES).astype(np.float64)

    def _interval(self, tops: Array, bottoms: Array) -> tuple[float, float]:
        if self.count < 2:
            return math.nan, math.nan
        value, error, tail = float(tops.sum() / bottoms.sum()), _error(tops, bottoms), (1 - self.level) / 2
        if self.count > _MOST_UNITS:
            width = float(-error * ndtri(tail))
            return value - width, value + width
        sums = self._counts @ np.stack([tops, bottoms, tops**2, tops * bottoms, bottoms**2], axis=1)
        ratios, errors = sums[:, 0] / sums[:, 1], _errors_of_sums(sums, self.count)
        has_spread = errors > 1e-9 * max(error, abs(value) * 1e-6)
        if (~has_spread).mean() > _COARSE:
            tail = float(ndtr(stdtrit(self.count - 1, tail) * math.sqrt(self.count / (self.count - 1))))
            low, high = np.quantile(ratios, [tail, 1 - tail])
            return float(low), float(high)
        distances = (ratios - value)[has_spread] / errors[has_spread]
        far, near = np.quantile(distances, [1 - tail, tail])
        own = tops / bottoms
        return max(float(value - far * error), float(own.min())), min(float(value - near * error), float(own.max()))


def _error(tops: Array, bottoms: Array) -> float:
    """The standard error of a ratio of sums, by its linear part."""
    value, count = tops.sum() / bottoms.sum(), len(tops)
    return float(np.sqrt(((tops - value * bottoms) ** 2).sum() / (count - 1) / count) / bottoms.mean())


def _errors_of_sums(sums: Array, count: int) -> Array:
    """The same of samples, from their sums of tops, bottoms, tops², tops · bottoms and bottoms²."""
    tops, bottoms, tops2, products, bottoms2 = sums.T
    ratios = tops / bottoms
    squares = np.maximum(tops2 - 2 * ratios * products + ratios**2 * bottoms2, 0)
    return np.sqrt(squares / (count - 1) / count) / (bottoms / count)


def _ones(values: Array, denominators: Array | None) -> Array:
    return np.ones(len(values)) if denominators is None else np.asarray(denominators, np.float64)
