"""An epoch of batches by tokens decodes each shard about once, whatever the sizes of groups."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.shards import Response, cache_of, count_reads

from dpkd.core.errors import UserError
from dpkd.distill.batches.shares import CacheShares
from dpkd.distill.batches.token_budget import TokenBatchOrder
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.held_out import choose_examples, split_rows
from dpkd.distill.rows.pairs import best_responses, paired_rows
from dpkd.distill.rows.row import RowIndex, RowSource
from dpkd.distill.rows.sources import CacheRows
from dpkd.distill.rows.views import JoinedRows, SubsetRows
from dpkd.distill.run.setup import open_run
from dpkd.distill.training import train
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.order import WINDOW_GROUPS, epoch_order, window_ends


def responses(num_examples: int, num_samples: int = 1) -> list[Response]:
    random = np.random.default_rng(0)
    return [
        (f"e{number}", sample, [-float(random.integers(1, 9))] * int(random.integers(1, 6)))
        for number in range(num_examples)
        for sample in range(num_samples)
    ]


def with_failures(rows: list[Response]) -> list[Response | None]:
    """One row in thirty fails, in places that no shard size divides."""
    fails = np.random.default_rng(1).random(len(rows)) < 1 / 30
    return [None if failed else row for row, failed in zip(rows, fails, strict=True)]


def epoch_rows(rows: RowSource, shards_per_row: int, shares: CacheShares | None = None) -> Iterator[RowIndex]:
    """The rows of the first epoch, in the order of a run with batches by tokens."""
    order = TokenBatchOrder(
        rows.lengths_by_group(), 0, budget=60, sequences=shards_per_row, micro_batches_per_step=1,
        shards_per_row=shards_per_row, shares=shares,
    )  # fmt: skip
    for step in range(order.num_steps(1)):
        yield from order.micro_batches_of(step)[0]


def decodes(rows: RowSource, reads: Counter[str], shards_per_row: int, shares: CacheShares | None = None) -> float:
    """How often an epoch decodes each shard, on average."""
    reads.clear()
    for index in epoch_rows(rows, shards_per_row, shares):
        rows.row(*index)
    return sum(reads.values()) / len(reads)


@pytest.mark.parametrize("rows_per_shard", [32, 64, 100, 128])
def test_pairs_with_failed_and_held_out_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_shard: int
) -> None:
    rows = responses(3000)
    cache, held = cache_of(tmp_path, {"teacher": rows}, {"teacher": with_failures(rows)}, rows_per_shard)
    source = CacheRows(cache, cache.shards(), held)
    held_out = choose_examples((row[0] for row in rows), 60, seed=0)
    training, _ = split_rows(source, source.ids_by_group(), held_out)
    reads = count_reads(monkeypatch)
    assert decodes(training, reads, 2) == 1
    assert len(reads) == 2 * len(cache.shards())
    # each kind of row alone: two windows of groups are one of 1,024 rows where they are small
    students = CacheRows(cache, cache.shards(), held, pairs=False)
    assert decodes(students, reads, 1) == 1
    assert decodes(CacheRows(cache, cache.shards()), reads, 1) == 1


@pytest.mark.parametrize(("num_samples", "rows_per_shard"), [(4, 128), (4, 100), (8, 64)])
def test_best_against_worst_of_several_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_samples: int, rows_per_shard: int
) -> None:
    rows = responses(3000 // num_samples, num_samples)
    cache, held = cache_of(tmp_path, {"teacher": rows}, {"teacher": with_failures(rows)}, rows_per_shard)
    reads = count_reads(monkeypatch)
    assert decodes(paired_rows(cache, held, cache.shards(), "best-vs-worst"), reads, 2) == 1
    # the best responses alone, where the student's are sampled live
    every = CacheRows(cache, cache.shards())
    assert decodes(SubsetRows(every, best_responses(cache, cache.shards())), reads, 1) == 1


def test_several_caches_with_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []
    for number, rows_per_shard in enumerate((100, 128)):
        rows = responses(3000)
        cache, held = cache_of(
            tmp_path / f"{number}", {"teacher": rows}, {"teacher": with_failures(rows)}, rows_per_shard
        )
        parts.append((number, CacheRows(cache, cache.shards(), held)))
    shares = CacheShares([rows.group_sizes for _, rows in parts], [0.7, 0.3], ["a", "b"], 0)
    joined, reads = JoinedRows(parts), count_reads(monkeypatch)
    # 1.4 epochs of the one cache and 0.6 of the other: as many reads as row after row
    for group, row in shares.epoch(0).tolist():
        joined.row(group, row)
    row_by_row = sum(reads.values()) / len(reads)
    assert 1 < row_by_row < 1.4
    assert decodes(joined, reads, 2, shares) <= row_by_row


sizes_of_groups = st.lists(st.integers(0, 9), min_size=1, max_size=40)


@settings(deadline=None)
@given(sizes_of_groups, st.integers(0, 99), st.integers(0, 9), st.integers(1, 3))
def test_window_ends_are_those_of_the_order(sizes: list[int], seed: int, epoch: int, windows: int) -> None:
    order = epoch_order(sizes, seed, epoch)
    if not len(order):
        return
    ends = window_ends(sizes, seed, epoch, windows * WINDOW_GROUPS)
    assert ends[-1] == len(order)
    parts = [set(part[:, 0].tolist()) for part in np.split(order, ends[:-1])]
    # no group is in two windows, and each has no more groups than it may
    assert sum(map(len, parts)) == len(set(order[:, 0].tolist()))
    assert 0 < min(map(len, parts)) <= max(map(len, parts)) <= windows * WINDOW_GROUPS
    assert len(ends) <= -(-len(sizes) // (windows * WINDOW_GROUPS))


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=40), min_size=2, max_size=3), st.integers(0, 99))
def test_windows_of_several_caches_mix_few_groups_and_no_row_twice(sizes: list[list[int]], seed: int) -> None:
    shares = CacheShares(sizes, [1.0, 2.0, 0.5][: len(sizes)], ["a", "b", "c"][: len(sizes)], seed)
    first_group = np.cumsum([0, *map(len, sizes)])
    for epoch in range(3):
        order, ends = shares.epoch(epoch), shares.window_ends(epoch, lambda _: WINDOW_GROUPS)
        assert ends[-1] == shares.num_rows
        for window in np.split(order, ends[:-1]):
            rows = [tuple(row) for row in window.tolist()]
            assert len(set(rows)) == len(rows)
            of_cache = np.searchsorted(first_group, np.unique(window[:, 0]), side="right")
            assert np.bincount(of_cache).max() <= WINDOW_GROUPS


@pytest.mark.parametrize(
    ("group_size", "shards_per_row", "groups_of_window"),
    [(32, 1, 16), (64, 1, 16), (100, 1, 8), (64, 2, 8), (300, 1, 8)],
)
def test_small_windows_are_joined_where_a_reader_keeps_their_shards(
    group_size: int, shards_per_row: int, groups_of_window: int
) -> None:
    order = TokenBatchOrder(
        [np.arange(group_size) % 97 + 1] * 32, 0, budget=970, sequences=1, micro_batches_per_step=1,
        shards_per_row=shards_per_row,
    )  # fmt: skip
    groups = [group for step in range(order.num_steps(1)) for group, _ in order.micro_batches_of(step)[0]]
    window = groups_of_window * group_size
    parts = [set(groups[start : start + window]) for start in range(0, len(groups), window)]
    assert [len(part) for part in parts] == [groups_of_window] * (32 // groups_of_window)
    assert len(set(groups[: window // 2])) > groups_of_window // 2


def test_a_run_knows_which_rows_need_two_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_teacher: Path, toy_student: Path, toy_data: Path
) -> None:
    """A window of pairs holds 8 groups, which is 16 shards; one of single rows 16 groups."""
    options: dict[str, Any] = {
        "teacher": str(toy_teacher), "out": tmp_path / "cache", "engine": "transformers", "template": "chat",
        "max_new_tokens": 6, "top_k": 4, "rows_per_shard": 2, "device": "cpu",
    }  # fmt: skip
    build_cache(CacheConfig(**options, data=str(toy_data), responses="both"))
    build_cache(CacheConfig(**options, student=str(toy_student), round="r0"))
    reads = count_reads(monkeypatch)
    pairs: list[dict[str, Any]] = [{"level": "sequence"}, {"mix": 0.5, "objective": "jsd"}]
    for loss in ({}, *(loss | {"round": "r0"} for loss in [{"objective": "jsd"}, *pairs])):
        run = open_run(
            TrainConfig(
                cache=str(tmp_path / "cache"), student=str(toy_student), out=Path("out"), device="cpu", epochs=1,
                responses="all", batch_tokens=1200, validation_examples=0, **loss,
            )
        )  # fmt: skip
        reads.clear()
        indices = [index for step in range(run.steps) for part in run.order.micro_batches_of(step) for index in part]
        assert len(indices) == 40
        for index in indices:
            run.rows.row(*index)
        assert sum(reads.values()) == len(reads) >= 20, loss


def test_a_run_of_the_former_order_is_refused_until_it_is_complete(
    tmp_path: Path, toy_cache: Path, toy_student: Path
) -> None:
    config = TrainConfig(
        cache=str(toy_cache), student=str(toy_student), out=tmp_path / "run", device="cpu", steps=2,
        batch_tokens=1200, validation_examples=0, tracker="none",
    )  # fmt: skip
    run = train(config)
    facts = json.loads((run / "dpkd-run.json").read_text())
    del facts["token_order"]
    (run / "dpkd-run.json").write_text(json.dumps(facts))
    assert train(config) == run  # it is complete: nothing is read any more
    (run / "run.json").unlink()
    with pytest.raises(UserError, match=r"token_order: null -> 2.*another version of dpkd began the run"):
        train(config)
    # without batches by tokens nothing has changed, and older runs resume
    plain = config.model_copy(update={"batch_tokens": None, "out": tmp_path / "plain"})
    facts = json.loads((train(plain) / "dpkd-run.json").read_text())
    assert facts.pop("token_order") is None
    (plain.out / "dpkd-run.json").write_text(json.dumps(facts))
    (plain.out / "run.json").unlink()
    train(plain)
