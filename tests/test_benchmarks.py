"""Tests of the benchmarks: that they compare like with like, count right and judge right."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import contenders, drawing, ground, growth, limit, processes, report
from benchmarks.targets import targets
from stages.model import blas
from stages.tokens.row import TokenRow
from tests.support.imports import ROOT

Run = Callable[[contenders.Ground, Path], contenders.Figures]


def entry(rate: float, memory: float, loss: float, **more: Any) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "first_epoch": rate,
        "second_epoch": rate,
        "seconds_to_first_update": 1.0,
        "peak_memory_bytes": memory,
    }
    figures |= {"evaluation": rate, "cached_evaluation": None, "losses": [loss, loss]}
    return {"runs": [figures | more], "same_updates": True, "loss": loss, "untrained": 3.0}


def results(**ours: Any) -> dict[str, Any]:
    """A run of `bench` in which every target is met, but for what `ours` changes."""
    best = {"rate": 400.0, "memory": 0.4e9, "loss": 2.0, "cached_evaluation": 500.0, "evaluation": 250.0} | ours
    entries = {
        "(a) stock": entry(3.0, 1e9, 2.0),
        "(b) fast": entry(100.0, 1e9, 2.0),
        "(c) peft": entry(200.0, 1e9, 2.0),
        "(d) plain": entry(120.0, 1e9, 2.0),
        "(e) all": entry(best.pop("rate"), best.pop("memory"), best.pop("loss"), **best),
    }
    batch = {"tokens": 400.0, "trained_tokens": 200.0, "longest": 120}
    bound = {"flops_per_token": 1e8, "gflops_per_second": 100.0, "tokens_per_second": 1000.0}
    return {
        "machine": "a machine",
        "versions": {"mlx": "0"},
        "data": "rows",
        "rounds": 1,
        "updates": 4,
        "batches": {"answers": batch, "whole": batch},
        "kinds": {"answers": entries, "whole": entries},
        "limit": {"answers": bound, "whole": bound},
    }


def missed(found: dict[str, Any]) -> list[str]:
    return [what for what, _, verdict in targets(found) if verdict != "met"]


def test_all_targets_can_be_awaited() -> None:
    assert missed(results()) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"rate": 290.0}, "3 × (b)"),
        ({"memory": 0.55e9}, "0.5 × (c)"),
        ({"evaluation": 199.0}, "speed of evaluation"),
        ({"cached_evaluation": 199.0}, "speed of cached evaluation"),
        ({"loss": 2.001}, "losses with each saving"),
    ],
)
def test_a_missed_target_is_called_missed(change: dict[str, float], what: str) -> None:
    assert any(what in line for line in missed(results(**change)))


def test_the_sweep_is_held_against_its_targets() -> None:
    sweep = {"first": 100.0, "second": 51.0, "ours": 200.0, "theirs": 700.0}
    found = missed(results() | {"sweep": sweep})
    assert [line.split(",")[0] for line in found] == ["second experiment"]


def test_memory_beyond_the_weights_must_less_than_double_with_the_length() -> None:
    def point(length: int, peak: int) -> dict[str, Any]:
        figures = {"second_epoch": 1.0, "peak_memory_bytes": peak}
        return {"axis": "length", "shape": {"length": length}, "weights_bytes": 100, "figures": {"(e) all": figures}}

    points = [point(128, 200), point(256, 290), point(512, 490)]
    assert [line.split(",")[1] for line in missed(results() | {"growth": points})] == [
        " 256 → 512 tokens a row: 2 × at most"
    ]


def test_the_tables_name_every_contender_and_the_share_of_the_limit() -> None:
    text = report.markdown(results())
    assert all(text.count(f"| {name} |") == 4 for name in ("(b) fast", "(c) peft", "(d) plain", "(e) all"))
    assert "Reached: 40%" in text


def test_bars_are_as_long_as_the_rates() -> None:
    text = drawing.draw({"loss": [("(b) one", 100.0, 90.0, 110.0), ("(e) two", 200.0, 190.0, 220.0)]})
    widths = [float(part.split('"')[0]) for part in text.split(' width="')[3:]]
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.01)


def test_the_limit_counts_the_products_that_remain() -> None:
    config = {"hidden_size": 6, "intermediate_size": 10, "vocab_size": 100, "num_attention_heads": 2} | {
        "num_key_value_heads": 1
    }
    found = limit.products(config, tokens=8, trained=3, length=4.0, lora={"layers": 2, "rank": 1})
    flops = sum(2 * rows * inner * columns * times for rows, inner, columns, _, times in found)
    qkv, rest = 6 * 6 + 2 * 6 * 3, 6 * 6 + 3 * 6 * 10
    linear = 8 * (qkv * (2 + 1) + rest * (2 + 2))
    low_rank = 8 * 2 * (2 * 6 + 3 * 6 + 2 * 6 + 3 * 3)
    attention, head = 8 * 6 * 4 * 6 * 2, 3 * 6 * 100 * 2
    assert flops == 2 * (linear + low_rank + attention + head)


def test_rows_are_chosen_in_batches_of_like_length_over_all_lengths() -> None:
    lengths = np.random.default_rng(0).permutation(np.arange(2, 66))
    rows = [TokenRow("", "", np.zeros(n, np.int32), np.ones(n, bool), 0, False) for n in lengths]
    chosen = [len(row.input_ids) for row in ground.spread(rows, batches=4)]
    assert [chosen[i : i + 4] for i in range(0, 16, 4)] == [[n, n + 1, n + 2, n + 3] for n in (10, 26, 42, 58)]
    with pytest.raises(ValueError, match="68 rows are needed, and there are 64"):
        ground.spread(rows, batches=17)


def test_a_command_that_fails_tells_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no luck"):
        processes.run(["-c", "import sys; sys.exit('no luck')"], folder=tmp_path, log=tmp_path / "log")


def test_peak_memory_is_that_of_the_one_child(tmp_path: Path) -> None:
    # Measured from a small process: a child's figure begins with the memory of the one that started it.
    code = (
        "from pathlib import Path; from benchmarks.processes import run; here = Path(); log = Path('log')\n"
        "for child in ('x = bytes([1]) * 300_000_000', 'pass'):\n"
        "    print(run(['-c', child], folder=here, log=log).peak_memory_bytes)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    large, small = map(int, printed.stdout.split())
    assert large > 300e6 > small


@pytest.fixture
def small_ground(tmp_path: Path) -> contenders.Ground:
    """A few updates on a small random model."""
    shape = {"length": 40, "vocabulary": 512, "rank": 4, "frozen": 1}
    blas.preload()
    growth.make(tmp_path / "ground", shape)
    # At the rows' own length mlx-lm has no pad target to train on.
    lora, training = growth.lora_and_training(shape)
    return contenders.Ground(tmp_path / "ground", "answers", growth.BATCHES, lora, training | {"max_length": 40})


def assert_same_updates(work: contenders.Ground, folder: Path, their_run: Run) -> None:
    """Their run and this project's have the same losses, and all figures of both are measured."""
    figures = []
    for name, run in {"theirs": their_run, "ours": contenders.ours({}, evaluate=True)}.items():
        (folder / name).mkdir()
        figures.append(run(work, folder / name))
    theirs, ours = figures
    assert len(ours.losses) == work.updates
    assert theirs.losses == pytest.approx(ours.losses, rel=1e-5)
    assert len({round(loss, 3) for loss in ours.losses}) > 1
    assert all(each.evaluation and each.peak_memory_bytes > 1e8 for each in figures)


def test_mlx_lm_does_the_same_updates(small_ground: contenders.Ground, tmp_path: Path) -> None:
    assert_same_updates(small_ground, tmp_path, contenders.mlx_lm)


@pytest.mark.peers
def test_peft_does_the_same_updates(small_ground: contenders.Ground, tmp_path: Path) -> None:
    assert_same_updates(small_ground, tmp_path, partial(contenders.peft, python=sys.executable))
