"""The data order: every row once, a function of seed and epoch only, within windows."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dpkd.teacher_cache.store.order import epoch_order

sizes = st.lists(st.integers(1, 7), min_size=1, max_size=20)


@given(sizes, st.integers(0, 99), st.integers(0, 9), st.integers(1, 5))
def test_an_epoch_holds_every_row_once(group_sizes: list[int], seed: int, epoch: int, window: int) -> None:
    order = epoch_order(group_sizes, seed, epoch, window)
    expected = {(group, row) for group, size in enumerate(group_sizes) for row in range(size)}
    assert {tuple(pair) for pair in order.tolist()} == expected
    assert len(order) == sum(group_sizes)


@given(sizes, st.integers(1, 5))
def test_a_window_touches_few_groups(group_sizes: list[int], window: int) -> None:
    order = epoch_order(group_sizes, 0, 0, window)
    starts, seen = 0, set()
    while starts < len(order):
        groups = []
        for group, _ in order[starts:]:
            if group not in groups:
                if len(groups) == window:
                    break
                groups.append(group)
        # a window is done before the next begins: none of its groups comes back
        length = sum(group_sizes[group] for group in groups)
        assert set(order[starts : starts + length, 0].tolist()) == set(groups)
        assert not seen & set(groups)
        seen |= set(groups)
        starts += length


def test_epochs_and_seeds_differ_and_repeat() -> None:
    first = epoch_order([50, 50], 1, 0)
    assert np.array_equal(first, epoch_order([50, 50], 1, 0))
    assert not np.array_equal(first, epoch_order([50, 50], 1, 1))
    assert not np.array_equal(first, epoch_order([50, 50], 2, 0))
