"""Pairs of an example's responses, where a cached round has several: which chosen one stands against which rejected.

`all`            every chosen response of an example with every student response to it, each pair once
`best-vs-worst`  one pair an example: of the chosen responses the one with the highest teacher log-prob a token (mean
                 over its tokens, EOS counted), of the student's the one with the lowest; the first where they are equal

(The third rule, `index`, takes rows in file order: `dpkd.distill.rows.sources.CacheRows`.) A row that failed in the
round is no response, and an example without a student response makes no pair. What counts is what lies in the
given shards: with `--responses teacher` the student responses beside reference rows take no part.

Only places of rows are kept, 16 bytes a pair; rows are read as they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import pyarrow.compute as pc

from dpkd.core.errors import UserError
from dpkd.distill.batches.batch import TrainingRow
from dpkd.distill.rows.held_out import read_columns, read_example_ids, read_lengths
from dpkd.teacher_cache.store.folders import Folder
from dpkd.teacher_cache.store.order import WINDOW_GROUPS
from dpkd.teacher_cache.store.reader import Round, TeacherCache
from dpkd.teacher_cache.store.shards import ShardRecord, read_shard

PairRule = Literal["all", "best-vs-worst"]


def paired_rows(cache: TeacherCache, held: Round, shards: Sequence[ShardRecord], rule: PairRule) -> PairedRows:
    """The pairs of the cache's `shards` with those of the round that lie beside them.

    Reads example ids (for `best-vs-worst` log-probs too) of all of them once. Raises `UserError` when there is no pair.
    """
    numbers: dict[str, int] = {}
    with_scores = rule == "best-vs-worst"
    chosen = _read_responses(cache.folder, shards, numbers, with_scores)
    rejected = _read_responses(
        held.folder, [held.shards_by_path[record.path] for record in shards], numbers, with_scores
    )
    # the group of an example is the shard of its first chosen row; an example without one is in no pair
    first_shard = np.zeros(len(numbers), np.int32)
    examples, first = np.unique(chosen.example, return_index=True)
    first_shard[examples] = chosen.shard[first]
    if with_scores:
        chosen, rejected = chosen.take(_lowest(chosen, -chosen.score)), rejected.take(_lowest(rejected, rejected.score))
    ours, theirs = cross(chosen.example, rejected.example)
    if not len(ours):
        raise UserError(
            "the round gives no pair",
            found=f"{len(chosen.example)} chosen responses, {len(rejected.example)} of the student",
            where=held.folder,
            advice="Train with another --round",
        )
    pairs = np.stack([chosen.shard[ours], chosen.place[ours], rejected.shard[theirs], rejected.place[theirs]], axis=1)
    return PairedRows(cache, held, shards, pairs, first_shard[chosen.example[ours]])


class PairedRows:
    """Pairs as a source of rows. A group holds the pairs of the examples that begin in one shard of the cache."""

    def __init__(
        self,
        cache: TeacherCache,
        held: Round,
        shards: Sequence[ShardRecord],
        pairs: np.ndarray,
        group_of_pair: np.ndarray,
    ) -> None:
        """`pairs` is [N, 4]: shard and place in it of the chosen row, then of the rejected one."""
        self._cache_folder, self._round_folder = cache.folder, held.folder
        self._shards = list(shards)
        self._beside = [held.shards_by_path[record.path] for record in shards]
        order = np.argsort(group_of_pair, kind="stable")
        _, starts = np.unique(group_of_pair[order], return_index=True)
        self._groups = np.split(pairs[order].astype(np.int32), starts[1:])
        self.group_sizes = [len(group) for group in self._groups]
        self.longest = max(record.longest for record in [*self._shards, *self._beside])
        # an example may go on in the next shard and stand in those of another origin: what a window of the data order
        # touches stays decoded
        most = max(_num_distinct(group[:, 0]) + _num_distinct(group[:, 2]) for group in self._groups)
        self._read = lru_cache(maxsize=WINDOW_GROUPS * most)(read_shard)

    def row(self, group: int, index: int) -> TrainingRow:
        """Pair `index` of a group."""
        shard, place, other_shard, other_place = map(int, self._groups[group][index])
        chosen = self._read(self._cache_folder, self._shards[shard]).row(place)
        return TrainingRow(chosen, self._read(self._round_folder, self._beside[other_shard]).row(other_place))

    def lengths_by_group(self) -> list[np.ndarray]:
        """See `RowSource`; reads the ids of all rows once."""
        ours = [read_lengths(self._cache_folder, record) for record in self._shards]
        theirs = [read_lengths(self._round_folder, record) for record in self._beside]
        return [
            np.array([max(ours[shard][place], theirs[beside][other]) for shard, place, beside, other in group])
            for group in self._groups
        ]

    def ids_by_group(self) -> list[list[str]]:
        """Example id of every pair, read from the shards."""
        ids = [read_example_ids(self._cache_folder, record) for record in self._shards]
        return [[ids[shard][place] for shard, place in group[:, :2].tolist()] for group in self._groups]


@dataclass(frozen=True)
class _Responses:
    """R responses: number of the example, number of the shard, place in it, mean log-prob a token (nats)."""

    example: np.ndarray
    shard: np.ndarray
    place: np.ndarray
    score: np.ndarray

    def take(self, places: np.ndarray) -> _Responses:
        return _Responses(self.example[places], self.shard[places], self.place[places], self.score[places])


def _read_responses(
    folder: Folder, records: Sequence[ShardRecord], numbers: dict[str, int], with_scores: bool
) -> _Responses:
    """The responses of shards in order; `numbers` gives each example its number and takes up new ones."""
    names = ["example_id", "response_logprobs"] if with_scores else ["example_id"]
    parts: list[list[np.ndarray]] = [[], [], [], []]
    for shard, record in enumerate(records):
        table = read_columns(folder, record, names)
        ids = table["example_id"].to_pylist()
        values = (
            np.array([numbers.setdefault(example_id, len(numbers)) for example_id in ids], np.int32),
            np.full(len(ids), shard, np.int32),
            np.arange(len(ids), dtype=np.int32),
            _means(table["response_logprobs"]) if with_scores else np.zeros(len(ids)),
        )
        for part, value in zip(parts, values, strict=True):
            part.append(value)
    return _Responses(*(np.concatenate(part) for part in parts))


def _means(lists: object) -> np.ndarray:
    """Mean of every list of a column of lists; 0 for an empty one."""
    lengths = pc.list_value_length(lists).to_numpy()
    owners = np.repeat(np.arange(len(lengths)), lengths)
    # each list is summed by itself, so that equal lists have equal means wherever they stand
    sums = np.bincount(owners, weights=pc.list_flatten(lists).to_numpy(), minlength=len(lengths))
    return sums / np.maximum(lengths, 1)


def _lowest(responses: _Responses, score: np.ndarray) -> np.ndarray:
    """Place of each example's response with the lowest score, the first of equal ones."""
    order = np.lexsort((np.arange(len(score)), score, responses.example))
    _, first = np.unique(responses.example[order], return_index=True)
    return order[first]


def cross(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places (i, j) of every pair with ours[i] == theirs[j], each once: i in order, j in order for each i."""
    order = np.argsort(theirs, kind="stable")
    starts = np.searchsorted(theirs[order], ours, side="left")
    counts = np.searchsorted(theirs[order], ours, side="right") - starts
    i = np.repeat(np.arange(len(ours)), counts)
    within = np.arange(len(i)) - np.repeat(np.cumsum(counts) - counts, counts)
    return i, order[np.repeat(starts, counts) + within]


def _num_distinct(values: np.ndarray) -> int:
    return len(np.unique(values))
