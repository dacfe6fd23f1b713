"""The order of training windows: a permutation each epoch, the same at any world size, from any step."""

from __future__ import annotations

import numpy as np
import pytest

from bigtrain.data.sampler import permute, sample_windows


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 1000, 4097])
def test_each_epoch_is_a_permutation(n: int) -> None:
    epochs = sample_windows(7, 0, 3 * n, n).reshape(3, n)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(n))
    if n > 16:
        assert (epochs[0] != epochs[1]).any()
        assert (epochs[1] != epochs[2]).any()


def test_a_step_is_the_same_from_wherever_it_is_reached() -> None:
    whole = sample_windows(3, 0, 8 * 50, 97)
    for step in (0, 1, 11, 12, 13, 49):  # 97 windows: steps cross from one epoch into the next
        assert sample_windows(3, step, 8, 97).tolist() == whole[step * 8 : (step + 1) * 8].tolist()


def test_another_global_batch_goes_on_where_the_data_stand() -> None:
    """80 sequences in 10 steps of 8, then 4 steps of 20, then of 5: each once, in the one order."""
    parts = [sample_windows(3, step, 8, 1000) for step in range(10)]
    parts += [sample_windows(3, step, 20, 1000, shift=80 - 10 * 20) for step in range(10, 14)]
    parts += [sample_windows(3, step, 5, 1000, shift=160 - 14 * 5) for step in range(14, 20)]
    assert np.concatenate(parts).tolist() == sample_windows(3, 0, 190, 1000).tolist()


def test_seeds_differ_and_repeat() -> None:
    orders = {seed: sample_windows(seed, 0, 1000, 1000).tolist() for seed in range(20)}
    assert len({tuple(order) for order in orders.values()}) == 20
    assert orders[5] == sample_windows(5, 0, 1000, 1000).tolist()
    # the next seed is not the same order one epoch later
    assert sample_windows(0, 1, 1000, 1000).tolist() != orders[1]


def test_the_order_looks_random() -> None:
    n = 10_000
    order = sample_windows(0, 0, n, n)
    correlation = np.corrcoef(order, np.arange(n))[0, 1]
    assert abs(correlation) < 0.05
    assert (np.abs(np.diff(order)) == 1).mean() < 0.002  # neighbours are not read one after the other
    firsts = np.concatenate([sample_windows(seed, 0, 1, 16) for seed in range(3200)])
    counts = np.bincount(firsts, minlength=16)
    assert (((counts - 200) ** 2) / 200).sum() < 45  # chi-square, 15 degrees of freedom: p = 1e-4 at 44


def test_a_trillion_windows_cost_no_memory() -> None:
    n = 10**12
    windows = sample_windows(1, 10**9, 64, n)
    assert windows.min() >= 0
    assert windows.max() < n
    assert len(set(windows.tolist())) == 64


def test_known_values() -> None:
    """A run that is resumed with a later version must see the order it began with."""
    assert sample_windows(0, 0, 8, 100).tolist() == [30, 69, 58, 44, 96, 61, 3, 24]


def test_no_window() -> None:
    with pytest.raises(ValueError, match="no whole window"):
        sample_windows(0, 0, 1, 0)


def test_permute_takes_a_key_for_each_index() -> None:
    index = np.arange(50, dtype=np.uint64)
    one, two = permute(index, 50, np.full(50, 1, np.uint64)), permute(index, 50, np.full(50, 2, np.uint64))
    mixed = permute(index, 50, np.where(index < 25, np.uint64(1), np.uint64(2)))
    assert mixed.tolist() == one[:25].tolist() + two[25:].tolist()
