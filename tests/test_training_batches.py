"""Batch plans: pure functions of (seed, step) that lose and repeat nothing, however they are split."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mahalo_ray.training.batches import (
    RowGroups,
    accumulation_steps,
    hash_split,
    plan_balanced_batches,
    plan_batches,
    shard,
    split_batch,
)

sizes = st.lists(st.integers(1, 5), min_size=1, max_size=40)


def units_of(rows: list[int], seed: int = 0) -> RowGroups:
    lengths = np.random.default_rng(seed).integers(1, 50, len(rows))
    return RowGroups(np.array(rows), lengths, lengths * np.array(rows))


@given(sizes, st.integers(1, 12), st.integers(1, 3), st.integers(0, 5))
def test_every_unit_is_used_once_per_epoch(rows: list[int], batch_size: int, epochs: int, seed: int) -> None:
    batches = plan_batches(np.array(rows), batch_size, epochs, None, seed)
    used = np.bincount(np.concatenate(batches), minlength=len(rows))
    assert (used == epochs).all()
    for batch in batches:
        assert len(batch) == 1 or sum(rows[unit] for unit in batch) <= batch_size


@given(sizes, st.integers(1, 12), st.integers(1, 30), st.integers(0, 5))
def test_max_steps_is_exact_and_longer_plans_begin_the_same(
    rows: list[int], batch_size: int, steps: int, seed: int
) -> None:
    short = plan_batches(np.array(rows), batch_size, 1.0, steps, seed)
    longer = plan_batches(np.array(rows), batch_size, 1.0, steps + 7, seed)
    assert len(short) == steps
    assert all((a == b).all() for a, b in zip(short, longer, strict=False))


def test_seed_changes_the_order() -> None:
    rows = np.ones(50, dtype=np.int64)
    first, again, other = (plan_batches(rows, 10, 1.0, None, seed)[0].tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_no_data_is_an_error() -> None:
    with pytest.raises(ValueError, match="no rows"):
        plan_batches(np.empty(0, dtype=np.int64), 4, 1.0, None, 0)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 9), st.sampled_from([0.5, 1.0, 2.0])
)
def test_balanced_batches_use_all_of_the_largest_and_repeat_the_others(
    counts: list[int], share: int, epochs: float
) -> None:
    starts = np.cumsum([0, *counts])
    groups = [np.arange(a, b) for a, b in pairwise(starts)]
    batch_size = share * len(groups)
    batches = plan_balanced_batches(groups, batch_size, epochs, None, 3)
    assert all(len(batch) == batch_size for batch in batches)
    for group in groups:
        inside = [int(np.isin(batch, group).sum()) for batch in batches]
        assert inside == [share] * len(batches)
        used = np.bincount(np.concatenate(batches), minlength=starts[-1])[group]
        assert used.max() - used.min() <= 1  # its own cursor: no row twice before every row once
        assert used.sum() >= epochs * len(group)


def test_balanced_batches_share_a_remainder_and_refuse_too_small_a_batch() -> None:
    groups = [np.arange(0, 20), np.arange(20, 40), np.arange(40, 60)]
    batch = plan_balanced_batches(groups, 7, 1.0, None, 0)[0]
    assert [int(np.isin(batch, group).sum()) for group in groups] == [3, 2, 2]
    with pytest.raises(ValueError, match="batch_size is 2"):
        plan_balanced_batches(groups, 2, 1.0, None, 0)


@given(sizes, st.integers(1, 12), st.integers(5, 9), st.integers(1, 3), st.integers(0, 5))
def test_split_keeps_every_unit_whole_and_fits(
    rows: list[int], batch_size: int, micro_rows: int, workers: int, seed: int
) -> None:
    units = units_of(rows, seed)
    batches = plan_batches(units.rows, batch_size, 1.0, None, seed)
    accumulation = accumulation_steps(batches, units, micro_rows, workers)
    for batch in batches:
        shares = split_batch(batch, units, micro_rows, workers, accumulation)
        assert len(shares) == accumulation and all(len(row) == workers for row in shares)
        parts = [part for row in shares for part in row]
        assert sorted(np.concatenate(parts).tolist()) == sorted(batch.tolist())
        assert all(units.rows[part].sum() <= micro_rows for part in parts)


def test_split_balances_padded_cost_and_keeps_similar_lengths_together() -> None:
    lengths = np.array([10] * 8 + [40] * 2)
    units = RowGroups(np.ones(10, dtype=np.int64), lengths, lengths)
    short, long = split_batch(np.arange(10), units, 16, 2, 1)[0]
    assert sorted(short.tolist()) == list(range(8)) and sorted(long.tolist()) == [8, 9]


def test_rows_that_must_stay_together_need_a_large_enough_micro_batch() -> None:
    units = units_of([6, 2])
    with pytest.raises(ValueError, match="at least 6"):
        accumulation_steps([np.array([0, 1])], units, 4, 1)


@given(sizes, st.integers(5, 9), st.integers(1, 4))
def test_shards_cover_everything_with_equal_numbers_of_calls(
    rows: list[int], micro_rows: int, workers: int
) -> None:
    units, everything = units_of(rows), np.arange(len(rows))
    shares = [shard(everything, units, micro_rows, rank, workers) for rank in range(workers)]
    assert len({len(share) for share in shares}) == 1
    counted = [part for share in shares for part, real in share if real]
    assert sorted(np.concatenate(counted).tolist()) == everything.tolist()


def test_held_out_rows_go_by_key_alone() -> None:
    keys = [f"k{number}" for number in range(2000)]
    aside = hash_split(keys + keys, 0.2, 7)
    assert (aside[:2000] == aside[2000:]).all()
    assert 0.15 < aside.mean() < 0.25
    assert (hash_split(keys[:10], 0.2, 7) == aside[:10]).all()
    assert not hash_split(keys, 0.0, 7).any() and hash_split(keys, 1.0, 7).all()
