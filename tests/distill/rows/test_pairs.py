"""Pairs of several samples: each pair once, best against worst, across shards and failed rows."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.shards import Response, cache_of, count_reads

from dpkd.core.errors import UserError
from dpkd.distill.batches.order import BatchOrder
from dpkd.distill.rows.held_out import cache_examples, choose_examples, split_rows
from dpkd.distill.rows.pairs import PairRule, best_responses, cross, paired_rows
from dpkd.distill.rows.row import RowSource
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.rows import Origin


def pairs(rows: RowSource) -> list[tuple[str, str, int, int]]:
    """(example, origin of the chosen row, its sample, the student's sample) of every pair."""
    found = []
    for group, size in enumerate(rows.group_sizes):
        for index in range(size):
            row = rows.row(group, index)
            assert row.rejected is not None
            assert row.rejected.origin == "student"
            assert row.chosen.example_id == row.rejected.example_id
            found.append((row.chosen.example_id, row.chosen.origin, row.chosen.sample, row.rejected.sample))
    return found


@given(st.lists(st.integers(0, 4), max_size=12), st.lists(st.integers(0, 4), max_size=12))
def test_cross_is_every_match_once(ours: list[int], theirs: list[int]) -> None:
    i, j = cross(np.array(ours, np.int32), np.array(theirs, np.int32))
    expected = [(a, b) for a, one in enumerate(ours) for b, other in enumerate(theirs) if one == other]
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == expected


logprobs = st.lists(st.sampled_from([-0.5, -1.0, -2.0, -4.0]), min_size=1, max_size=4)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[Response], list[Response | None], int]:
    """Examples with one to four samples, a student row for each that may have failed, and a shard size."""
    rows: list[Response] = []
    students: list[Response | None] = []
    for number in range(draw(st.integers(1, 6))):
        for sample in range(draw(st.integers(1, 4))):
            rows.append((f"e{number}", sample, draw(logprobs)))
            students.append((f"e{number}", sample, draw(logprobs)) if draw(st.integers(0, 3)) else None)
    return rows, students, draw(st.integers(1, 5))


@settings(deadline=None, max_examples=40)
@given(worlds(), st.sampled_from(["all", "best-vs-worst"]))
def test_every_pair_of_the_rule_comes_once(
    world: tuple[list[Response], list[Response | None], int], rule: PairRule
) -> None:
    rows, students, size = world
    answered = [row for row in students if row is not None]
    expected = []
    for example_id in dict.fromkeys(row[0] for row in rows):
        chosen = [row for row in rows if row[0] == example_id]
        rejected = [row for row in answered if row[0] == example_id]
        if rule == "best-vs-worst" and rejected:
            chosen = [max(chosen, key=lambda row: sum(row[2]) / len(row[2]))]
            rejected = [min(rejected, key=lambda row: sum(row[2]) / len(row[2]))]
        expected += [(example_id, "teacher", one[1], other[1]) for one in chosen for other in rejected]
    with tempfile.TemporaryDirectory() as directory:
        cache, held = cache_of(Path(directory), {"teacher": rows}, {"teacher": students}, size)
        if not expected:
            with pytest.raises(UserError, match=r"the round gives no pair: found \d+ chosen responses, 0 of the stud"):
                paired_rows(cache, held, cache.shards(), rule)
            return
        source = paired_rows(cache, held, cache.shards(), rule)
        found = pairs(source)
        assert all(source.group_sizes)
        assert source.longest == 2 + max(len(row[2]) for row in [*rows, *answered])
        assert [ids for group in source.ids_by_group() for ids in group] == [pair[0] for pair in found]
        assert Counter(found) == Counter(expected)
        # a group holds the examples that begin in one shard
        shard_of = {example_id: place // size for place, (example_id, _, _) in reversed(list(enumerate(rows)))}
        starts = [{shard_of[example_id] for example_id in group} for group in source.ids_by_group()]
        assert all(len(shards) == 1 for shards in starts)
        assert [min(shards) for shards in starts] == sorted({shard_of[pair[0]] for pair in expected})


def test_responses_of_both_origins_pair_with_all_of_the_student(tmp_path: Path) -> None:
    rows: dict[Origin, list[Response]] = {
        "teacher": [("a", 0, [-1.0]), ("a", 1, [-0.5]), ("b", 0, [-1.0]), ("b", 1, [-1.5])],
        "reference": [("a", 0, [-3.0]), ("b", 0, [-0.1])],
    }
    students: dict[Origin, list[Response | None]] = {
        "teacher": [("a", 0, [-2.0]), ("a", 1, [-4.0]), None, ("b", 1, [-1.0])],
        "reference": [("a", 0, [-1.0]), ("b", 0, [-8.0, 0.0])],
    }
    cache, held = cache_of(tmp_path, rows, students, 2)
    everything = paired_rows(cache, held, cache.shards(), "all")
    assert len(pairs(everything)) == 3 * 3 + 3 * 2
    best = paired_rows(cache, held, cache.shards(), "best-vs-worst")
    places = [best.row(group, 0) for group in range(len(best.group_sizes))]
    assert sum(best.group_sizes) == 2 == sum(map(len, best.ids_by_group()))
    found = {
        row.chosen.example_id: (row.chosen.origin, row.chosen.response_logprobs[0], row.rejected.response_logprobs[0])
        for row in [*places, *(best.row(0, index) for index in range(best.group_sizes[0]))]
        if row.rejected is not None
    }
    # -8 over two tokens is as low a token as -4 over one: a token, not a response, is what is compared
    assert found == {"a": ("teacher", -0.5, -4.0), "b": ("reference", np.float32(-0.1), -8.0)}
    alone = paired_rows(cache, held, cache.shards("teacher"), "all")
    assert sorted(pairs(alone)) == [
        ("a", "teacher", 0, 0), ("a", "teacher", 0, 1), ("a", "teacher", 1, 0), ("a", "teacher", 1, 1),
        ("b", "teacher", 0, 1), ("b", "teacher", 1, 1),
    ]  # fmt: skip


def test_an_end_of_unknown_log_prob_does_not_make_a_response_better(tmp_path: Path) -> None:
    """An endpoint's EOS is stored as 0: it must not count, or the shorter of two responses gains more by it."""
    # without the 0: -2 and -1.9 a token; with it: -1.33 and -1.52
    rows: dict[Origin, list[Response]] = {
        "teacher": [("a", 0, [-3.0, -1.0, 0.0]), ("a", 1, [-1.9, -1.9, -1.9, -1.9, 0.0])]
    }
    # of a round every EOS is known, one of log-prob 0 as well: -1.9 and -2 a token
    students: dict[Origin, list[Response | None]] = {"teacher": [("a", 0, [-3.8, 0.0]), ("a", 1, [-2.0, -2.0])]}
    for end, best in (("known", 0), ("unknown", 1)):
        cache, held = cache_of(tmp_path / end, rows, students, 2, end)
        assert pairs(paired_rows(cache, held, cache.shards(), "best-vs-worst")) == [("a", "teacher", best, 1)]
        (chosen,) = best_responses(cache, cache.shards())
        assert chosen.tolist() == [best]


def test_an_epoch_decodes_every_shard_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Response] = [(f"e{number}", sample, [-1.0]) for number in range(90) for sample in range(3)]
    cache, held = cache_of(tmp_path, {"teacher": rows}, {"teacher": list(rows)}, 4)
    reads = count_reads(monkeypatch)
    source = paired_rows(cache, held, cache.shards(), "all")
    for place in BatchOrder(source.group_sizes, 0, sum(source.group_sizes)).rows_of(0):
        source.row(*place)
    assert len(reads) == 2 * 68
    # once with its own window, and again where an example continues from the window before
    assert max(reads.values()) <= 2


@pytest.mark.parametrize("rule", ["all", "best-vs-worst"])
def test_pairs_of_a_real_round(
    tmp_path: Path, toy_teacher: Path, toy_student: Path, toy_data: Path, rule: PairRule
) -> None:
    options = {"teacher": str(toy_teacher), "out": tmp_path / "cache", "engine": "transformers", "template": "chat"}
    options |= {"max_new_tokens": 6, "top_k": 4, "rows_per_shard": 4}
    build_cache(CacheConfig(**options, data=str(toy_data), limit=5, num_samples=3))
    build_cache(CacheConfig(**options, student=str(toy_student), round="r0"))
    cache = TeacherCache.open(tmp_path / "cache")
    source = paired_rows(cache, cache.round("r0"), cache.shards(), rule)
    found = pairs(source)
    assert len(set(found)) == len(found) == (5 * 9 if rule == "all" else 5)
    row = source.row(0, 0)
    assert row.rejected is not None
    assert row.chosen.prompt_ids.tolist() == row.rejected.prompt_ids.tolist()
    assert row.chosen.distributions is not None
    training, validation = split_rows(source, source.ids_by_group(), choose_examples(cache_examples(cache), 2, seed=0))
    assert {pair[0] for pair in pairs(validation)} == choose_examples(cache_examples(cache), 2, seed=0)
    assert Counter(pairs(training)) + Counter(pairs(validation)) == Counter(found)
