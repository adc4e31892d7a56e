"""Training rows of a cache with an optional round, and which of them are held out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from dpkd.core.errors import UserError
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.columns import read_each, read_example_ids, read_keyed_lengths, read_lengths
from dpkd.distill.rows.held_out import cache_examples, choose_examples, conversation_of, split_rows
from dpkd.distill.rows.pairs import PairedRows, best_responses, paired_rows
from dpkd.distill.rows.requirements import check_distributions, check_samples, no_distributions
from dpkd.distill.rows.row import RowSource, TrainingRow
from dpkd.distill.rows.views import SubsetRows
from dpkd.teacher_cache.store.folder import Folder
from dpkd.teacher_cache.store.reader import Round, TeacherCache
from dpkd.teacher_cache.store.shards import ShardRecord


class CacheRows:
    """Rows of a cache's shards. With a round: its student responses, each paired with the cache's row of the same key.

    With `pairs=False` only the round's rows are read: student responses with the teacher's distributions on them.
    Rows that failed in the round are in neither. `sampled` is the longest response that will be sampled live to each
    row's prompt, in tokens: lengths count it, because nobody knows yet how long it will be.
    """

    def __init__(
        self,
        cache: TeacherCache,
        shards: list[ShardRecord],
        student_round: Round | None = None,
        *,
        pairs: bool = True,
        sampled: int | None = None,
    ) -> None:
        self._cache, self._shards, self._round, self._pairs = cache, shards, student_round, pairs
        self._sampled = sampled

    @cached_property
    def group_sizes(self) -> list[int]:
        return [self._in_round(shard).rows for shard in self._shards]

    @cached_property
    def longest(self) -> int:
        return max(max(shard.longest, self._in_round(shard).longest) for shard in self._shards)

    def _in_round(self, record: ShardRecord) -> ShardRecord:
        return record if self._round is None else self._round.shards_by_path[record.path]

    def row(self, group: int, index: int) -> TrainingRow:
        record = self._shards[group]
        if self._round is None:
            return TrainingRow(self._cache.read(record).row(index))
        students = self._cache.read_round(self._round, record)
        if not self._pairs:
            return TrainingRow(students.row(index))
        shard = self._cache.read(record)
        return TrainingRow(shard.row(shard.index_of[students.key(index)]), students.row(index))

    def lengths_by_group(self) -> list[np.ndarray]:
        """Reads the ids of all rows once."""
        if self._sampled is not None:
            read = partial(read_lengths, sampled=self._sampled, with_response=self._pairs)
            return read_each(read, self._cache.folder, self._shards)
        if self._round is None:
            return read_each(read_lengths, self._cache.folder, self._shards)
        if not self._pairs:
            return read_each(read_lengths, self._round.folder, [self._in_round(record) for record in self._shards])
        return read_each(self._lengths_of_pairs, self._cache.folder, self._shards)

    def _lengths_of_pairs(self, folder: Folder, record: ShardRecord) -> np.ndarray:
        """Tokens of the longer sequence of each pair, in the order of the round's rows."""
        assert self._round is not None
        ours = dict(read_keyed_lengths(folder, record))
        theirs = read_keyed_lengths(self._round.folder, self._in_round(record))
        return np.array([max(length, ours[key]) for key, length in theirs], np.int64)

    def ids_by_group(self) -> list[list[str]]:
        """Example id of every row."""
        folder = self._cache.folder if self._round is None else self._round.folder
        return read_each(read_example_ids, folder, [self._in_round(record) for record in self._shards])


class BestRows(SubsetRows):
    """The teacher's best response to each example: the rows of `best-vs-worst` where the student's are sampled live.

    `shards` are those of `rows`, a shard to a group.
    """

    def __init__(self, rows: CacheRows, cache: TeacherCache, shards: list[ShardRecord]) -> None:
        super().__init__(rows, best_responses(cache, shards))
        self._rows = rows

    def ids_by_group(self) -> list[list[str]]:
        """Example id of every row."""
        ids = self._rows.ids_by_group()
        return [[ids[group][index] for index in indices] for group, indices in self._groups]


@dataclass(frozen=True)
class CacheSplit:
    """The rows of a cache to train on, and those held out of training, of `held_out` of the cache's `examples`.

    Without validation rows, `reason` says why in words. `references` are the reference responses of the held-out
    examples, whatever rows the run trains on; None where the cache has none, or where Rouge-L is not measured.
    """

    training: RowSource
    validation: RowSource | None = None
    held_out: int = 0
    examples: int = 0
    reason: str = "--validation-examples is 0"
    references: RowSource | None = None


def open_cache_rows(
    cache: TeacherCache, student_round: Round | None, config: TrainConfig, held_out: Collection[str] | None = None
) -> CacheSplit:
    """The rows that `config` trains on (for `mix`, the pairs), and those that it is validated on.

    `held_out` are the examples to hold out, where several caches decide that; None: those that `config` chooses.

    Raises `UserError` when the cache does not hold what the objective needs, or what was asked to be validated.
    """
    check_distributions(cache, student_round, config)
    if config.student_samples == "live" and cache.has_spans:
        raise UserError(
            "live samples answer each row's prompt once, and rows of this cache have several spans",
            where=cache.folder,
            advice="Build the cache with --turns last, or with --responses teacher, which has a row for each turn",
        )
    origin = config.origin
    shards = cache.shards(origin)
    if not shards:
        raise UserError(
            f"the cache holds no {origin} responses",
            found=", ".join(cache.origins),
            expected=origin,
            where=cache.folder,
            advice="Change --responses, or build a cache with --responses both",
        )
    source: CacheRows | PairedRows | BestRows
    if student_round is not None and config.needs_pairs and config.pairing != "index":
        source = paired_rows(cache, student_round, shards, config.pairing)
    else:
        sampled = longest_sample(cache, config) if config.student_samples == "live" else None
        pairs = config.needs_pairs or config.mix is not None
        source = CacheRows(cache, shards, student_round, pairs=pairs, sampled=sampled)
        if config.student_samples == "live":
            check_samples(cache, shards, config)
            if config.pairing == "best-vs-worst":
                source = BestRows(source, cache, shards)
    return _split(cache, shards, student_round, source, config, held_out)


def _split(
    cache: TeacherCache,
    shards: list[ShardRecord],
    student_round: Round | None,
    source: CacheRows | PairedRows | BestRows,
    config: TrainConfig,
    held_out: Collection[str] | None,
) -> CacheSplit:
    """Rows of `source` to train on, and rows of the held-out examples."""
    if config.validation_examples == 0:
        return CacheSplit(source)
    examples = cache_examples(cache)
    # of several caches none may train on what another holds out
    may_do_without = config.validation_examples is None and held_out is None
    held_out = choose_held_out(examples, config) if held_out is None else examples & set(held_out)
    if not held_out:
        return CacheSplit(source, reason=f"the cache has only {len(examples)} examples")
    measured = source
    if isinstance(source, BestRows) or (student_round is not None and not config.needs_pairs):
        # KL on the best responses alone compares with no other pairing; on the student's own rows with no other run,
        # nor with the same one after another round
        measured = CacheRows(cache, shards)
        if config.needs_distributions and cache.top_k == 0:
            what = "validation measures the teacher's responses, and the cache has no distributions of them"
            if may_do_without:
                return CacheSplit(source, reason=what)
            raise no_distributions(what, cache, "train without --validation-examples")
    ids = _examples_by_group(cache, source)
    measured_ids = ids if measured is source else _examples_by_group(cache, measured)
    try:
        training, _ = split_rows(source, ids, held_out)
        _, validation = split_rows(measured, measured_ids, held_out)
    except UserError as error:
        if may_do_without:
            return CacheSplit(source, reason=str(error))
        raise
    references = _references(cache, held_out) if config.best_metric == "rouge_l" else None
    return CacheSplit(training, validation, len(held_out), len(examples), references=references)


def _examples_by_group(cache: TeacherCache, rows: CacheRows | PairedRows | BestRows) -> list[list[str]]:
    return [[conversation_of(cache, name) for name in group] for group in rows.ids_by_group()]


def _references(cache: TeacherCache, held_out: Collection[str]) -> RowSource | None:
    """The reference responses of the `held_out` examples; None where the cache has no references."""
    shards = cache.shards("reference")
    if not shards:
        return None
    rows = CacheRows(cache, shards)
    masks = [[example in held_out for example in group] for group in _examples_by_group(cache, rows)]
    return SubsetRows(rows, [np.flatnonzero(mask) for mask in masks])


def choose_held_out(examples: Collection[str], config: TrainConfig) -> frozenset[str]:
    """The examples of a cache that `config` holds out; none where it has too few to spare any."""
    num = config.num_held_out(len(examples))
    return choose_examples(examples, num, config.seed) if num else frozenset()


def longest_sample(cache: TeacherCache, config: TrainConfig) -> int:
    """Longest response that is sampled live, in tokens."""
    return config.sample_max_new_tokens or int(cache.identities["generation"]["max_new_tokens"])


def check_lengths(rows: RowSource, limit: int | None, *, where: str) -> None:
    """`check_positions` of the longest of `rows`; the error says how many are too long."""
    if limit is None or rows.longest <= limit:
        return
    lengths = np.concatenate(rows.lengths_by_group())
    too_long = f", which {int((lengths > limit).sum())} of {len(lengths)} rows exceed"
    check_positions(rows.longest, limit, where=where, too_long=too_long)


def check_positions(longest: int, limit: int | None, *, where: str, too_long: str = "") -> None:
    """Raise `UserError` when `longest`, in tokens, exceeds the student's positions (None: no limit)."""
    if limit is not None and longest > limit:
        raise UserError(
            "the longest row is longer than the student's positions",
            found=f"{longest} tokens",
            expected=f"at most {limit}{too_long}",
            where=where,
            advice="Build the cache with a smaller --max-prompt-tokens or --max-new-tokens",
        )
