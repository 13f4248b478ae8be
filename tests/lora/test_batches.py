"""Batches: every row once an epoch, in an order that only the seed and the epoch decide."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.lora.batches import collate, sorted_batches, split
from stages.training.updates import Updates, epoch_updates
from tests.support.rows import token_row

ROWS: dict[str, Any] = {"batch_tokens": None, "grad_accumulation": 1}


def epoch_batches(lengths: list[int], **options: Any) -> list[np.ndarray]:
    return epoch_updates(lengths, **(ROWS | options))


LENGTHS = st.lists(st.integers(2, 300), min_size=1, max_size=200)


@given(lengths=LENGTHS, batch_size=st.integers(1, 9), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_every_row_exactly_once_an_epoch(lengths: list[int], batch_size: int, seed: int, epoch: int) -> None:
    batches = epoch_batches(lengths, batch_size=batch_size, seed=seed, epoch=epoch)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    sizes = sorted(map(len, batches))
    assert set(sizes[1:]) <= {batch_size}
    assert 0 < sizes[0] <= batch_size


@given(lengths=LENGTHS, batch_size=st.integers(1, 9))
def test_sorted_batches_hold_every_row_once(lengths: list[int], batch_size: int) -> None:
    assert sorted(np.concatenate(sorted_batches(lengths, batch_size=batch_size))) == list(range(len(lengths)))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(epoch_batches(list(range(2, 102)), batch_size=4, seed=seed, epoch=epoch)).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(0, 0)), tuple(order(0, 1)), tuple(order(1, 0))}) == 3


def test_membership_of_batches_changes_between_epochs() -> None:
    lengths = np.random.default_rng(0).integers(10, 300, 600).tolist()
    first, second = (
        {frozenset(batch.tolist()) for batch in epoch_batches(lengths, batch_size=4, seed=0, epoch=epoch)}
        for epoch in (0, 1)
    )
    assert len(first & second) < len(first) / 2


def test_rows_of_like_length_share_a_batch() -> None:
    lengths = np.random.default_rng(0).integers(10, 300, 600)
    batches = epoch_batches(lengths.tolist(), batch_size=4, seed=0, epoch=0)
    padded = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
    assert padded < 1.06 * lengths.sum()
    unsorted = sum(int(lengths[i : i + 4].max()) * 4 for i in range(0, 600, 4))
    assert unsorted > 1.25 * lengths.sum()


# --- batches by a budget of tokens


@given(lengths=LENGTHS, tokens=st.integers(1, 900), accumulation=st.integers(1, 3), epoch=st.integers(0, 3))
def test_a_budget_takes_every_row_once_and_is_kept(
    lengths: list[int], tokens: int, accumulation: int, epoch: int
) -> None:
    size: dict[str, Any] = {"batch_size": None, "batch_tokens": tokens}
    updates = epoch_updates(lengths, grad_accumulation=accumulation, seed=0, epoch=epoch, **size)
    assert sorted(np.concatenate(updates)) == list(range(len(lengths)))
    for update in updates:
        sizes = [lengths[i] for i in update]
        batches = [sizes[part] for part in split(sizes, **size)]
        assert 0 < len(batches) <= accumulation
        assert all(len(batch) == 1 or max(batch) * len(batch) <= tokens for batch in batches)


@given(lengths=LENGTHS, tokens=st.integers(1, 900))
def test_a_batch_is_as_full_as_the_budget_allows(lengths: list[int], tokens: int) -> None:
    parts = split(lengths, batch_size=None, batch_tokens=tokens)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(lengths)))
    for part in parts[:-1]:
        with_next = lengths[part.start : part.stop + 1]
        assert max(with_next) * len(with_next) > tokens


@given(
    lengths=LENGTHS,
    tokens=st.sampled_from([None, 300, 1500]),
    accumulation=st.integers(1, 3),
    steps=st.lists(st.integers(1, 60), min_size=1, max_size=5),
)
def test_an_update_is_the_same_in_whatever_order_updates_are_asked_for(
    lengths: list[int], tokens: int | None, accumulation: int, steps: list[int]
) -> None:
    options: dict[str, Any] = {"batch_size": 4 if tokens is None else None, "batch_tokens": tokens}
    options |= {"grad_accumulation": accumulation, "seed": 3}
    straight = Updates(lengths, **options)
    first = [straight.rows(step).tolist() for step in range(1, 61)]
    epochs = [update.tolist() for epoch in range(60) for update in epoch_updates(lengths, epoch=epoch, **options)]
    assert first == epochs[:60]
    assert [Updates(lengths, **options).rows(step).tolist() for step in steps] == [first[step - 1] for step in steps]
    assert straight.in_epochs(2) == sum(len(epoch_updates(lengths, epoch=epoch, **options)) for epoch in (0, 1))


def test_epochs_of_a_budget_may_differ_in_their_updates() -> None:
    lengths = np.random.default_rng(0).integers(10, 300, 2000).tolist()
    updates = Updates(lengths, batch_size=None, batch_tokens=700, grad_accumulation=1, seed=0)
    ends = [updates.in_epochs(epochs) for epochs in range(6)]
    assert ends[0] == 0
    assert len({after - before for before, after in pairwise(ends)}) > 1
    for end in ends[1:]:
        for rows in (updates.rows(end), updates.rows(end + 1)):
            assert len(rows) > 0
        assert sorted(np.concatenate([updates.rows(step) for step in range(1, ends[1] + 1)])) == list(range(2000))


def test_a_budget_pads_little() -> None:
    lengths = np.random.default_rng(0).integers(10, 300, 600)
    size: dict[str, Any] = {"batch_size": None, "batch_tokens": 1200}
    updates = epoch_updates(lengths.tolist(), grad_accumulation=1, seed=0, epoch=0, **size)
    padded = sum(int(lengths[rows].max()) * len(rows) for rows in updates)
    assert padded < 1.06 * lengths.sum()
    assert max(map(len, updates)) > 2 * min(map(len, updates))


def test_targets_are_the_next_tokens_of_the_masked_positions() -> None:
    short, long = token_row(0, 5, trained=2), token_row(1, 8, trained=3)
    batch = collate([short, long])
    assert batch.inputs_BxL.shape == (2, 7)
    assert batch.rows_N.tolist() == [0, 0, 1, 1, 1]
    assert batch.targets_N.tolist() == [*short.input_ids[-2:].tolist(), *long.input_ids[-3:].tolist()]
    flat = np.array(batch.inputs_BxL).reshape(-1)
    before = [*short.input_ids[-3:-1].tolist(), *long.input_ids[-4:-1].tolist()]
    assert flat[np.array(batch.trained_N)].tolist() == before
    assert batch.real_tokens == 13


def test_a_first_token_is_never_a_target() -> None:
    assert collate([token_row(0, 5, trained=5)]).trained_tokens == 4


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_the_last_short_batch_is_kept(batch_size: int) -> None:
    assert sum(map(len, epoch_batches([5] * 50, batch_size=batch_size, seed=0, epoch=0))) == 50
