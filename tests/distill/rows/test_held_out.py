"""Held-out examples: a partition by example, the same for every round and objective."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpkd.core.errors import UserError
from dpkd.distill.batches.order import BatchOrder
from dpkd.distill.rows.columns import read_example_ids
from dpkd.distill.rows.held_out import cache_examples, choose_examples, split_rows
from dpkd.distill.rows.row import TrainingRow
from dpkd.distill.rows.sources import CacheRows
from dpkd.distill.rows.views import SubsetRows
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.rows import CachedRow

NONE = np.zeros(0, np.int32)


class Rows:
    """A source whose rows carry their example id and place."""

    longest = 9

    def __init__(self, ids: list[list[str]]) -> None:
        self.ids = ids
        self.group_sizes = [len(group) for group in ids]

    def row(self, group: int, index: int) -> TrainingRow:
        return TrainingRow(CachedRow(self.ids[group][index], index, f"group-{group}", "stop", NONE, NONE, NONE, None))


def places(rows: SubsetRows) -> list[tuple[str, str, int]]:
    found = [rows.row(group, index).chosen for group, size in enumerate(rows.group_sizes) for index in range(size)]
    return [(row.origin, row.example_id, row.sample) for row in found]


names = st.sampled_from([f"e{number}" for number in range(12)])


@given(st.lists(st.lists(names, max_size=7), min_size=1, max_size=6), st.integers(1, 11), st.integers(0, 9))
def test_every_example_is_entirely_in_one_part(ids: list[list[str]], num: int, seed: int) -> None:
    distinct = {example_id for group in ids for example_id in group}
    if num >= len(distinct):
        with pytest.raises(UserError, match=r"leaves no example to train on: found validation_examples \d+"):
            choose_examples(distinct, num, seed)
        return
    held_out = choose_examples((example_id for group in ids for example_id in group), num, seed)
    assert len(held_out) == num
    training, validation = split_rows(Rows(ids), ids, held_out)
    assert all(training.group_sizes)
    assert all(validation.group_sizes)
    both = places(training) + places(validation)
    assert sorted(both) == sorted(
        (f"group-{group}", example_id, index) for group, rows in enumerate(ids) for index, example_id in enumerate(rows)
    )
    assert {example_id for _, example_id, _ in places(validation)} == held_out
    assert {example_id for _, example_id, _ in places(training)} == distinct - held_out
    assert training.longest == 9
    order = BatchOrder(training.group_sizes, seed, 2)
    assert order.num_rows + sum(validation.group_sizes) == sum(map(len, ids))


@given(st.lists(names, min_size=4, max_size=40), st.integers(0, 5))
def test_the_choice_depends_on_the_ids_alone(ids: list[str], seed: int) -> None:
    distinct = sorted(set(ids))
    if len(distinct) < 3:
        return
    two = choose_examples(ids, 2, seed)
    assert two == choose_examples(reversed(distinct), 2, seed)
    assert choose_examples(ids, 1, seed) < two  # more examples are those and others
    # an example that is not chosen may go, and the choice stays
    gone = next(example_id for example_id in distinct if example_id not in two)
    if len(distinct) > 3:
        assert choose_examples([example_id for example_id in distinct if example_id != gone], 2, seed) == two


def test_the_seed_makes_the_choice() -> None:
    ids = [f"e{number}" for number in range(100)]
    chosen = {choose_examples(ids, 5, seed) for seed in range(10)}
    assert len(chosen) == 10
    # `printf 3/eN | sha256sum` for N from 0 to 99, the smallest
    assert choose_examples(ids, 1, 3) == {"e16"}


def test_a_cache_is_split_the_same_way_with_and_without_its_round(toy_cache: Path) -> None:
    cache = TeacherCache.open(toy_cache)
    held = cache.round("r0")
    held_out = choose_examples(cache_examples(cache), 4, seed=0)
    assert len(held_out) == 4
    sides = []
    for shards, used in ((cache.shards(), None), (cache.shards(), held), (cache.shards("teacher"), held)):
        source = CacheRows(cache, shards, used)
        training, validation = split_rows(source, source.ids_by_group(), held_out)
        found = [{example_id for _, example_id, _ in places(rows)} for rows in (training, validation)]
        assert found[1] == held_out
        assert not found[0] & found[1]
        assert sum(training.group_sizes) + sum(validation.group_sizes) == sum(source.group_sizes)
        assert (validation.row(0, 0).rejected is None) == (used is None)
        sides.append(found)
    assert sides[0] == sides[1] == sides[2]
    assert CacheRows(cache, cache.shards()).ids_by_group() == CacheRows(cache, cache.shards(), held).ids_by_group()


def test_a_row_that_failed_in_a_round_moves_no_other_example(toy_cache: Path) -> None:
    cache = TeacherCache.open(toy_cache)
    held_out = choose_examples(cache_examples(cache), 3, seed=0)
    lost = min(held_out)
    ids = [
        [example_id for example_id in group if example_id != lost]
        for group in CacheRows(cache, cache.shards()).ids_by_group()
    ]
    _, validation = split_rows(Rows(ids), ids, held_out)
    assert {example_id for _, example_id, _ in places(validation)} == held_out - {lost}


def test_a_split_without_rows_is_refused() -> None:
    ids = [["a", "b"], ["a"]]
    with pytest.raises(UserError, match=r"no row is left to train on: found 3 rows, 2 examples held out"):
        split_rows(Rows(ids), ids, {"a", "b"})
    with pytest.raises(UserError, match="no row is left to validate on: found 3 rows, 1 examples held out"):
        split_rows(Rows(ids), ids, {"c"})


def test_a_shard_that_cannot_be_read_is_named(cache_copy: Path) -> None:
    cache = TeacherCache.open(cache_copy)
    record = cache.shards()[0]
    path = cache_copy / record.path
    assert len(read_example_ids(cache.folder, record)) == record.rows
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=rf"a shard of the cache cannot be read: .*{path.name}"):
        read_example_ids(cache.folder, record)
    path.unlink()
    with pytest.raises(UserError, match=rf"a shard of the cache is missing \(in .*{path.name}\)"):
        read_example_ids(cache.folder, record)


def test_example_ids_are_read_from_an_object_store(cache_copy: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(cache_copy), "/held-out-cache", recursive=True)
    try:
        remote, local = TeacherCache.open("memory://held-out-cache"), TeacherCache.open(cache_copy)
        assert choose_examples(cache_examples(remote), 3, seed=1) == choose_examples(cache_examples(local), 3, seed=1)
    finally:
        memory.rm("/held-out-cache", recursive=True)
