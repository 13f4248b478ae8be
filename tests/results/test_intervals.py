"""Intervals hold what they promise: measured by simulation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from stages.results.intervals import Estimate, Units

Array = np.ndarray
Draw = Callable[[np.random.Generator, int], tuple[Array, Array]]
SETS = 1000


def normal(rng: np.random.Generator, rows: int) -> tuple[Array, Array]:
    """Nats and tokens of rows of unequal length, 1.8 nats a token in the mean."""
    tokens = rng.integers(20, 300, rows).astype(float)
    return (1.8 + 0.4 * rng.standard_normal(rows)) * tokens, tokens


def skewed(rng: np.random.Generator, rows: int) -> tuple[Array, Array]:
    tokens = rng.integers(20, 300, rows).astype(float)
    return rng.lognormal(np.log(1.8) - 0.125, 0.5, rows) * tokens, tokens


def covered(draw: Draw, rows: int) -> float:
    """The share of intervals, of as many data sets, that hold the true 1.8."""
    rng, hits = np.random.default_rng(1), 0
    for seed in range(SETS):
        found = Units.of_rows(rows, seed=seed).ratio(*draw(rng, rows))
        assert found.low is not None and found.high is not None
        hits += found.low <= 1.8 <= found.high
    return hits / SETS


@pytest.mark.parametrize("draw", [normal, skewed])
@pytest.mark.parametrize("rows", [10, 24])
def test_95_of_100_intervals_hold_the_truth(draw: Draw, rows: int) -> None:
    # Three standard errors of the simulation around 95%, and two points more below for few and skewed rows.
    assert 0.91 <= covered(draw, rows) <= 0.97


@pytest.mark.parametrize("rows", [10, 24, 100])
def test_a_share_has_its_interval_though_it_be_rare(rows: int) -> None:
    rng, hits = np.random.default_rng(2), 0
    for _ in range(SETS):
        found = Units.of_rows(rows).ratio((rng.random(rows) < 0.05).astype(float), is_share=True)
        assert found.low is not None and found.high is not None and 0 <= found.low <= found.high <= 1
        hits += found.low <= 0.05 <= found.high
    assert hits / SETS >= 0.95


@pytest.mark.parametrize("rows", [10, 24])
def test_two_models_that_are_alike_are_seldom_told_apart(rows: int) -> None:
    rng, alarms = np.random.default_rng(3), 0
    for seed in range(SETS):
        base, tokens = skewed(rng, rows)
        change = tokens * 0.05 * rng.standard_normal(rows)
        alarms += not Units.of_rows(rows, seed=seed).difference(base, base + change, tokens).is_noise
    assert 0.03 <= alarms / SETS <= 0.09


def test_rows_that_belong_together_are_drawn_together() -> None:
    """Four copies of each row tell no more than one: by rows the interval is half as wide, by groups it is right."""
    losses, tokens = normal(np.random.default_rng(4), 12)
    copies = np.repeat(losses, 4), np.repeat(tokens, 4)
    one = Units.of_rows(12).ratio(losses, tokens)
    grouped = Units(np.repeat(np.arange(12), 4).tolist()).ratio(*copies)
    assert (grouped.low, grouped.high) == pytest.approx((one.low, one.high))
    assert width(Units.of_rows(48).ratio(*copies)) < 0.6 * width(one)


def width(estimate: Estimate) -> float:
    assert estimate.low is not None and estimate.high is not None
    return estimate.high - estimate.low


def test_pairing_sees_what_two_numbers_apart_do_not() -> None:
    base, tokens = skewed(np.random.default_rng(5), 24)
    found = Units.of_rows(24).difference(base, base - 0.01 * tokens, tokens)
    assert found.value == pytest.approx(-0.01)
    assert width(found) < 1e-9 < width(Units.of_rows(24).ratio(base, tokens))


def test_the_same_rows_give_the_same_interval_whatever_was_drawn_before() -> None:
    losses, tokens = normal(np.random.default_rng(6), 24)
    first = Units.of_rows(24).ratio(losses, tokens)
    units = Units.of_rows(24)
    units.ratio(tokens)
    assert units.ratio(losses, tokens) == first


def test_a_single_row_has_no_interval() -> None:
    assert Units.of_rows(1).ratio(np.array([6.0]), np.array([3.0])) == Estimate(2.0, None, None)


def test_shares_that_are_all_alike_leave_a_doubt() -> None:
    nothing = np.zeros(24)
    found = Units.of_rows(24).ratio(nothing, is_share=True)
    assert (found.value, found.low) == (0, 0) and found.high == pytest.approx(0.1425, abs=1e-3)
    change = Units.of_rows(24).difference(nothing, nothing, is_share=True)
    assert change.low == pytest.approx(-0.1425, abs=1e-3) and change.high == found.high


def test_a_perplexitys_interval_is_its_losss() -> None:
    found = Estimate(1.0, 0.5, 2.0).mapped(lambda nats: 10 * nats)
    assert found == Estimate(10.0, 5.0, 20.0)


def test_many_rows_take_the_normal_distribution() -> None:
    losses, tokens = normal(np.random.default_rng(7), 5000)
    found = Units.of_rows(5000).ratio(losses, tokens)
    assert width(found) == pytest.approx(2 * 1.96 * 0.4 * np.sqrt((tokens**2).sum()) / tokens.sum(), rel=0.05)


def test_the_rows_that_are_needed_show_half_the_difference() -> None:
    """With as many rows, about four of five data sets show it."""
    rng = np.random.default_rng(8)

    def pair(rows: int, change: float) -> tuple[Array, Array, Array]:
        base, tokens = normal(rng, rows)
        return base, base + tokens * (change + 0.3 * rng.standard_normal(rows)), tokens

    needed = Units.of_rows(4000).needed(*pair(4000, -0.2))
    assert needed is not None and 60 < needed < 130
    seen = sum(not Units.of_rows(needed).difference(*pair(needed, -0.1)).is_noise for _ in range(300))
    assert 0.72 < seen / 300 < 0.88
