"""Pairs of a chosen and a rejected response where a round has several student responses to an example.

`all`            every chosen response of an example with every student response to it, each pair once
`best-vs-worst`  one pair an example: the chosen response with the highest mean teacher log-prob of its tokens (the
                 EOS too, where its log-prob is known), and the student response with the lowest; the first one of
                 equal values

(`index`, the third rule, pairs rows of equal keys: `dpkd.distill.rows.sources.CacheRows`. Where responses are sampled
live, `best_responses` are the chosen ones of `best-vs-worst`.) Rows that failed in the
round, and examples without a student response, are in no pair. Only responses in the given shards count: with
`--responses teacher`, student responses to the reference rows' shards do not.

Pairs are kept as row numbers, 16 bytes a pair. Rows themselves are read when they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import numpy as np

from dpkd.core.errors import UserError
from dpkd.distill.rows.columns import read_columns, read_each, read_example_ids, read_lengths
from dpkd.distill.rows.row import TrainingRow
from dpkd.teacher_cache.store.folder import Folder
from dpkd.teacher_cache.store.order import WINDOW_GROUPS
from dpkd.teacher_cache.store.reader import Round, TeacherCache
from dpkd.teacher_cache.store.shards import ShardRecord, read_shard
from dpkd.teacher_cache.store.tables import mean_logprobs

PairRule = Literal["all", "best-vs-worst"]


def paired_rows(cache: TeacherCache, student_round: Round, shards: Sequence[ShardRecord], rule: PairRule) -> PairedRows:
    """The pairs of the cache's `shards` with the same shards of the round.

    Reads all example ids once, and for `best-vs-worst` all log-probs. Raises `UserError` when there is no pair.
    """
    numbers: dict[str, int] = {}
    with_scores = rule == "best-vs-worst"
    chosen = _read_responses(cache.folder, shards, numbers, with_scores, cache.ends_known)
    student_shards = [student_round.shards_by_path[record.path] for record in shards]
    rejected = _read_responses(student_round.folder, student_shards, numbers, with_scores)
    # the group of an example is the shard of its first chosen response; an example without one is in no pair
    first_shard = np.zeros(len(numbers), np.int32)
    examples, first = np.unique(chosen.example, return_index=True)
    first_shard[examples] = chosen.shard[first]
    if with_scores:
        chosen, rejected = chosen.take(_lowest(chosen, -chosen.score)), rejected.take(_lowest(rejected, rejected.score))
    i, j = cross(chosen.example, rejected.example)
    if not len(i):
        raise UserError(
            "the round gives no pair",
            found=f"{len(chosen.example)} chosen responses, {len(rejected.example)} of the student",
            where=student_round.folder,
            advice="Train with another --round",
        )
    pairs = np.stack([chosen.shard[i], chosen.index[i], rejected.shard[j], rejected.index[j]], axis=1)
    return PairedRows(cache, student_round, shards, pairs, first_shard[chosen.example[i]])


def best_responses(cache: TeacherCache, shards: Sequence[ShardRecord]) -> list[np.ndarray]:
    """For each of `shards`, the indices of the rows that are the best response to their example, ascending.

    Reads all example ids and log-probs once.
    """
    responses = _read_responses(cache.folder, shards, {}, with_scores=True, ends_known=cache.ends_known)
    best = responses.take(_lowest(responses, -responses.score))
    return [np.sort(best.index[best.shard == shard]) for shard in range(len(shards))]


class PairedRows:
    """Pairs as a `RowSource`. A group holds the pairs of the examples that start in one shard of the cache."""

    def __init__(
        self,
        cache: TeacherCache,
        student_round: Round,
        shards: Sequence[ShardRecord],
        pairs: np.ndarray,
        group_of_pair: np.ndarray,
    ) -> None:
        """`pairs` is [N, 4]: shard and index in it of the chosen response, then of the rejected one."""
        self._cache_folder, self._round_folder = cache.folder, student_round.folder
        self._shards = list(shards)
        self._round_shards = [student_round.shards_by_path[record.path] for record in shards]
        order = np.argsort(group_of_pair, kind="stable")
        _, starts = np.unique(group_of_pair[order], return_index=True)
        self._groups = np.split(pairs[order].astype(np.int32), starts[1:])
        self.group_sizes = [len(group) for group in self._groups]
        self.longest = max(record.longest for record in [*self._shards, *self._round_shards])
        # an example may continue in later shards; all shards of a window of the data order stay decoded
        most = max(len(np.unique(group[:, 0])) + len(np.unique(group[:, 2])) for group in self._groups)
        self._read = lru_cache(maxsize=WINDOW_GROUPS * most)(read_shard)

    def row(self, group: int, index: int) -> TrainingRow:
        shard, row, student_shard, student_row = map(int, self._groups[group][index])
        chosen = self._read(self._cache_folder, self._shards[shard]).row(row)
        return TrainingRow(chosen, self._read(self._round_folder, self._round_shards[student_shard]).row(student_row))

    def lengths_by_group(self) -> list[np.ndarray]:
        """Reads the ids of all rows once."""
        chosen = read_each(read_lengths, self._cache_folder, self._shards)
        rejected = read_each(read_lengths, self._round_folder, self._round_shards)
        return [
            np.array([max(chosen[shard][row], rejected[other][other_row]) for shard, row, other, other_row in group])
            for group in self._groups
        ]

    def ids_by_group(self) -> list[list[str]]:
        """Example id of every pair."""
        ids = read_each(read_example_ids, self._cache_folder, self._shards)
        return [[ids[shard][row] for shard, row in group[:, :2].tolist()] for group in self._groups]


@dataclass(frozen=True)
class _Responses:
    """R responses: number of the example, number of the shard, index in it, mean log-prob of a token (nats)."""

    example: np.ndarray
    shard: np.ndarray
    index: np.ndarray
    score: np.ndarray

    def take(self, indices: np.ndarray) -> _Responses:
        return _Responses(self.example[indices], self.shard[indices], self.index[indices], self.score[indices])


def _read_responses(
    folder: Folder,
    records: Sequence[ShardRecord],
    numbers: dict[str, int],
    with_scores: bool,
    ends_known: bool = True,
) -> _Responses:
    """The responses of shards in order. `numbers` maps example ids to numbers; new ids are added to it."""
    parts: list[tuple[np.ndarray, ...]] = []
    found = read_each(partial(_read_scores, with_scores=with_scores, ends_known=ends_known), folder, records)
    for shard, (ids, score) in enumerate(found):
        example = np.array([numbers.setdefault(example_id, len(numbers)) for example_id in ids], np.int32)
        parts.append((example, np.full(len(ids), shard, np.int32), np.arange(len(ids), dtype=np.int32), score))
    return _Responses(*map(np.concatenate, zip(*parts, strict=True)))


def _read_scores(
    folder: Folder, record: ShardRecord, *, with_scores: bool, ends_known: bool
) -> tuple[list[str], np.ndarray]:
    """Example ids of a shard's rows, and the mean log-prob of a token of each; zeros unless `with_scores`."""
    if not with_scores:
        ids = read_example_ids(folder, record)
        return ids, np.zeros(len(ids))
    table = read_columns(folder, record, ["example_id", "response_logprobs", "finish_reason"])
    return table["example_id"].to_pylist(), mean_logprobs(table, ends_known=ends_known)


def _lowest(responses: _Responses, score: np.ndarray) -> np.ndarray:
    """Index of each example's response with the lowest score, the first of equal ones."""
    order = np.lexsort((np.arange(len(score)), score, responses.example))
    _, first = np.unique(responses.example[order], return_index=True)
    return order[first]


def cross(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices (i, j) of every pair with ours[i] == theirs[j], each once: i ascending, j ascending for each i."""
    order = np.argsort(theirs, kind="stable")
    starts = np.searchsorted(theirs[order], ours, side="left")
    counts = np.searchsorted(theirs[order], ours, side="right") - starts
    i = np.repeat(np.arange(len(ours)), counts)
    within = np.arange(len(i)) - np.repeat(np.cumsum(counts) - counts, counts)
    return i, order[np.repeat(starts, counts) + within]
