"""Learning rates, update by update."""

from __future__ import annotations

import math

import pytest

from stages.training.optimizer import ScheduleName, learning_rate


def rates(schedule: ScheduleName, warmup_steps: int = 2, steps: int = 6, final: float = 0.0) -> list[float]:
    options = {"peak": 1.0, "schedule": schedule, "warmup_steps": warmup_steps, "steps": steps, "final": final}
    return [learning_rate(step, **options) for step in range(1, steps + 1)]  # type: ignore[arg-type]


def test_warm_up_rises_linearly_and_the_first_update_is_not_wasted() -> None:
    assert rates("constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_without_warm_up_the_first_update_has_the_full_rate() -> None:
    assert rates("linear", warmup_steps=0)[0] == rates("cosine", warmup_steps=0)[0] == 1.0


def test_linear_falls_evenly_to_the_final_rate() -> None:
    assert rates("linear") == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    assert rates("linear", final=0.2)[-1] == pytest.approx(0.4)


def test_cosine_falls_as_half_a_wave() -> None:
    expected = [0.5, 1.0, *((1 + math.cos(math.pi * i / 4)) / 2 for i in range(4))]
    assert rates("cosine") == pytest.approx(expected)
    assert rates("cosine", final=0.2)[3] == pytest.approx(0.2 + 0.8 * expected[3])


def test_a_warm_up_longer_than_the_run_just_rises() -> None:
    assert rates("cosine", warmup_steps=12) == pytest.approx([i / 12 for i in range(1, 7)])
