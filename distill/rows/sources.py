"""Where training rows come from: a cache with an optional round, or instruction data without a teacher."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource
from dpkd.core.progress import say
from dpkd.core.prompts.examples import SkippedRow, open_examples
from dpkd.core.prompts.templates import PromptEncoder
from dpkd.distill.batches.batch import RowSource, TrainingRow
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.held_out import choose_of_cache, ids_by_group, read_keys, read_lengths, split_rows
from dpkd.distill.rows.pairs import PairedRows, paired_rows
from dpkd.distill.rows.vocabulary import check_data
from dpkd.teacher_cache.build.plan import NO_REFERENCE, encode_examples
from dpkd.teacher_cache.store.folders import Folder
from dpkd.teacher_cache.store.reader import CacheReader, Round, TeacherCache
from dpkd.teacher_cache.store.schema import CachedRow, unscored_row
from dpkd.teacher_cache.store.shards import ShardRecord, check_shard


class CacheRows:
    """Rows of a cache's shards, each with its neighbour in a round when one is given.

    Without `pairs` the round's rows stand alone: the student's responses with the teacher's distributions on them.
    """

    def __init__(
        self, cache: TeacherCache, shards: list[ShardRecord], held: Round | None, *, pairs: bool = True
    ) -> None:
        self._cache, self._shards, self._round, self._pairs = cache, shards, held, pairs

    @cached_property
    def group_sizes(self) -> list[int]:
        """Rows in each shard; of a round's, where one is given: a row that it could not answer makes no pair."""
        return [self._paired(shard).rows for shard in self._shards]

    @cached_property
    def longest(self) -> int:
        """See `RowSource.longest`."""
        return max(max(shard.longest, self._paired(shard).longest) for shard in self._shards)

    def _paired(self, record: ShardRecord) -> ShardRecord:
        return record if self._round is None else self._round.shards_by_path[record.path]

    def row(self, group: int, index: int) -> TrainingRow:
        """Row `index` of shard `group`, and the student's response to the same prompt."""
        record = self._shards[group]
        if self._round is None:
            return TrainingRow(self._cache.read(record).row(index))
        students = self._cache.read_round(self._round, record)
        if not self._pairs:
            return TrainingRow(students.row(index))
        shard = self._cache.read(record)
        return TrainingRow(shard.row(shard.place_of[students.key(index)]), students.row(index))

    def lengths_by_group(self) -> list[np.ndarray]:
        """See `RowSource`; reads the ids of all rows once."""
        own = [read_lengths(self._cache.folder, record) for record in self._shards]
        if self._round is None:
            return own
        beside = [self._paired(record) for record in self._shards]
        drawn = [read_lengths(self._round.folder, record) for record in beside]
        if not self._pairs:
            return drawn
        # rows that failed in the round are not in it
        keys = [read_keys(self._cache.folder, record) for record in self._shards]
        theirs = [read_keys(self._round.folder, record) for record in beside]
        joined = []
        for lengths, ours, found, others in zip(own, keys, drawn, theirs, strict=True):
            place_of = {key: place for place, key in enumerate(ours)}
            joined.append(np.maximum(found, lengths[[place_of[key] for key in others]]))
        return joined


class DataRows:
    """Reference responses of instruction data, encoded in memory; no teacher has seen them."""

    def __init__(self, rows: list[CachedRow]) -> None:
        self._rows = rows
        self.group_sizes = [len(rows)]
        self.longest = max(len(row.prompt_ids) + len(row.response_ids) for row in rows)

    def row(self, group: int, index: int) -> TrainingRow:
        """Row `index`; there is one group."""
        return TrainingRow(self._rows[index])

    def lengths_by_group(self) -> list[np.ndarray]:
        """See `RowSource`."""
        return [np.array([len(row.prompt_ids) + len(row.response_ids) for row in self._rows])]


def open_cache_rows(cache: TeacherCache, held: Round | None, config: TrainConfig) -> tuple[RowSource, RowSource | None]:
    """The rows that `config` trains on, with those of the round `held` beside them, and those that are held out.

    Raises `UserError` when the cache does not hold what the objective needs.
    """
    check_distributions(cache, held, config)
    origin = _origin(config)
    shards = cache.shards(origin)
    if not shards:
        raise UserError(
            f"the cache holds no {origin} responses",
            found=", ".join(cache.origins),
            expected=origin,
            where=cache.folder,
            advice="Change --responses, or build a cache with --responses both",
        )
    if config.verify == "start":
        # every byte that will be read is checked before the first step, not when its turn comes
        for folder, shard in used_shards(cache, held, config):
            check_shard(folder, shard)
    source: CacheRows | PairedRows = CacheRows(cache, shards, held, pairs=config.needs_pairs)
    if held is not None and config.needs_pairs and config.pairing != "index":
        source = paired_rows(cache, held, shards, config.pairing)
    if not config.validation_examples:
        return source, None
    ids = source.ids_by_group() if isinstance(source, PairedRows) else ids_by_group(cache, held, shards)
    return split_rows(source, ids, choose_of_cache(cache, config.validation_examples, config.seed))


def _origin(config: TrainConfig) -> str | None:
    origin = "teacher" if config.objective == "seqkd" else config.responses
    return None if origin == "all" else origin


def used_shards(cache: TeacherCache, held: Round | None, config: TrainConfig) -> list[tuple[Folder, ShardRecord]]:
    """The shards that `config` trains on, and those of the round `held` beside them, each with its folder."""
    shards = cache.shards(_origin(config))
    students = [] if held is None else [(held.folder, held.shards_by_path[shard.path]) for shard in shards]
    return [*((cache.folder, shard) for shard in shards), *students]


def check_lengths(rows: RowSource, limit: int | None, *, where: str) -> None:
    """`check_positions` of the longest of `rows`; the error says how many are too long."""
    if limit is None or rows.longest <= limit:
        return
    lengths = np.concatenate(rows.lengths_by_group())
    check_positions(rows.longest, limit, where=where, num_rows=(int((lengths > limit).sum()), len(lengths)))


def check_positions(longest: int, limit: int | None, *, where: str, num_rows: tuple[int, int] | None = None) -> None:
    """Raise `UserError` when the longest row, in tokens, is longer than the student's positions (None: no limit).

    `num_rows` says how many rows are too long, and how many there are.
    """
    if limit is not None and longest > limit:
        raise UserError(
            "the longest row is longer than the student's positions",
            found=f"{longest} tokens",
            expected=f"at most {limit}"
            + ("" if num_rows is None else ", which {} of {} rows exceed".format(*num_rows)),
            where=where,
            advice="Build the cache with a smaller --max-prompt-tokens or --max-new-tokens",
        )


def top_k_of(cache: CacheReader, held: Round | None, config: TrainConfig) -> int:
    """Most entries a position of the responses that are learnt from: the round's where these stand alone."""
    if held is None or config.needs_pairs:
        return cache.top_k
    return int(held.manifest.identities["logprobs"]["top_k"])


def check_distributions(cache: CacheReader, held: Round | None, config: TrainConfig) -> None:
    """Raise `UserError` when the objective needs distributions and what it learns from keeps none."""
    if config.needs_distributions and top_k_of(cache, held, config) == 0:
        source = "cache" if held is None or config.needs_pairs else "round"
        raise UserError(
            f"the {source} has no distributions, which --objective {config.objective} --level {config.level} needs",
            found="top-k 0",
            expected="top-k of 1 or more",
            where=cache.folder,
            advice="Build a cache with --top-k 64, or train with --level sequence or --objective sft",
        )


def open_data_rows(
    config: TrainConfig, encoder: PromptEncoder, student: ModelSource
) -> tuple[DataRows, dict[str, str]]:
    """Rows of `config.data` and the data's identity; rows that cannot be used are counted and said.

    Raises `UserError` where none can, and for text that the student has no embeddings for.
    """
    assert config.data is not None  # the caller's choice
    source = open_examples(config.data)
    rows: list[CachedRow] = []
    skipped: list[SkippedRow] = []
    for item in encode_examples(source, encoder, config.max_prompt_tokens):
        if isinstance(item, SkippedRow):
            skipped.append(item)
            continue
        example, prompt = item
        if not example.references:
            skipped.append(SkippedRow(example.line, NO_REFERENCE))
        for sample, reference in enumerate(example.references):
            ids = encoder.response_ids(prompt, reference)[: config.max_new_tokens]
            rows.append(unscored_row(prompt.ids, ids, example.example_id, sample))
    for row in skipped[:5]:
        say(f"left out: line {row.line}: {row.reason}")
    if skipped:
        say(f"{len(skipped)} rows of the data are left out")
    if not rows:
        raise UserError("no row of the data can be used", where=config.data)
    check_data(student, rows, config.data)
    return DataRows(rows), source.identity
