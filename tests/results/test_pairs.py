"""Two runs on the rows that they share, and the words for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stages.results import pairs, words
from stages.results.intervals import Estimate

NAMES = ("old", "new")


def rows(losses: list[float], *, first: int = 0, tokens: int = 10) -> list[dict[str, Any]]:
    """Rows with these losses, in nats a token."""
    return [
        {"id": f"r{i}", "source": f"f:{i}", "group": None, "tokens": tokens, "bytes": 30, "adapter_loss": loss * tokens}
        for i, loss in enumerate(losses, start=first)
    ]


def test_a_better_run_is_said_to_be_better() -> None:
    found = pairs.compare(rows([2.0, 1.5, 1.8, 2.2]), rows([1.8, 1.4, 1.5, 2.0]), names=NAMES)
    assert found.sentence.startswith("better on 4 of 4 rows; loss −0.200 [−0.")
    assert found.verdict == "better"
    assert [pair.source for pair in found.best(1)] == ["f:2"] and found.worst(2) == []


def test_noise_is_called_noise() -> None:
    found = pairs.compare(rows([2.0, 1.5, 1.8, 2.2]), rows([2.1, 1.4, 1.9, 2.1]), names=NAMES)
    assert found.sentence.startswith("within noise: better on 2 of 4 rows; loss ") and found.verdict == "within noise"


def test_the_same_run_twice_is_no_difference() -> None:
    found = pairs.compare(rows([2.0, 1.5]), rows([2.0, 1.5]), names=NAMES)
    assert found.sentence == "within noise: better on 0 of 2 rows; loss +0.000 [+0.000, +0.000]"


def test_rows_in_common_are_compared_and_counted() -> None:
    found = pairs.compare(rows([2.0, 1.5, 1.8]), rows([1.4, 1.6, 9.9], first=1), names=NAMES)
    assert found.rows == 2
    assert "2 test rows are in both; 2 are in one alone, and left out" in found.notes


def test_runs_without_a_common_row_are_refused() -> None:
    with pytest.raises(ValueError, match="old and new have no test row in common; compare runs on the same data"):
        pairs.compare(rows([2.0]), rows([2.0], first=5), names=NAMES)


def test_other_tokenizers_are_compared_by_bytes() -> None:
    found = pairs.compare(rows([2.0, 1.5]), rows([3.0, 2.0], tokens=5), names=NAMES)
    assert found.unit == "bits per byte" and "bits per byte −" in found.sentence


def test_more_comparisons_widen_the_interval() -> None:
    old, new = rows([2.0, 1.5, 1.8, 2.2, 1.9]), rows([1.8, 1.4, 1.5, 2.0, 1.89])
    one, many = (pairs.compare(old, new, level=level, names=NAMES).difference for level in (0.95, 0.99))
    assert one.low is not None and many.low is not None and many.low < one.low


def test_the_sentence_of_each_kind() -> None:
    assert words.sentence(Estimate(-0.234, -0.27, -0.2), better=22, worse=2, rows=24) == (
        "better on 22 of 24 rows; loss −0.234 [−0.270, −0.200]"
    )
    worse = words.sentence(Estimate(0.1, 0.05, 0.2), better=2, worse=22, rows=24)
    assert worse == "worse on 22 of 24 rows; loss +0.100 [+0.050, +0.200]"


def test_few_rows_say_how_many_are_needed() -> None:
    assert words.rows_needed(60, 24, "row") == (
        "a difference half as large would take about 60 rows like these to be seen; there are 24"
    )
    assert words.rows_needed(10, 24, "row") is None and words.rows_needed(None, 24, "row") is None


def test_two_seeds_of_one_recipe_are_noise_whatever_their_difference() -> None:
    found = pairs.of_another_seed(pairs.compare(rows([2.0, 1.5, 1.8]), rows([1.8, 1.3, 1.6]), names=NAMES))
    assert found.sentence == (
        "within noise, for only the seed differs: better on 3 of 3 rows; loss −0.200 [−0.200, −0.200]"
    )
    assert found.verdict == "another seed"


def test_the_noise_of_seeds_holds_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 5):
        drawn = rng.normal(0, 0.01, (4000, count + 1))
        inside = [abs(one[0]) <= pairs.seed_noise(one[1:].tolist()) for one in drawn]
        assert np.mean(inside) == pytest.approx(0.95, abs=0.012)


def test_a_difference_that_a_seed_makes_too_is_noise() -> None:
    found = pairs.compare(rows([2.0, 1.5, 1.8, 2.2]), rows([1.8, 1.4, 1.5, 2.0]), names=NAMES)
    assert found.verdict == "better"
    widened = pairs.with_seed_noise(found, 0.3)
    assert widened.verdict == "within noise" and widened.sentence.startswith("within noise: better on 4 of 4 rows")
    same = pairs.with_seed_noise(found, 0.0).difference
    assert (same.low, same.high) == pytest.approx((found.difference.low, found.difference.high))
