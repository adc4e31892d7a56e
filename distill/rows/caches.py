"""The caches of a run: one with its teacher, or several with one tokenizer, each with its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource
from dpkd.distill.options.caches import CacheChoice
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.following import open_growing
from dpkd.distill.rows.held_out import cache_examples
from dpkd.distill.rows.requirements import check_distributions, top_k_of
from dpkd.distill.rows.row import RowSource
from dpkd.distill.rows.sources import CacheSplit, choose_held_out, open_cache_rows
from dpkd.distill.rows.views import JoinedRows
from dpkd.distill.rows.vocabulary import check_narrower
from dpkd.teacher_cache.store.folder import Folder
from dpkd.teacher_cache.store.reader import CacheReader, Round, TeacherCache
from dpkd.teacher_cache.store.shards import ShardRecord, check_shard

_SHORT = 12  # digits shown of a sha256


@dataclass(frozen=True)
class RunCache:
    """A cache that a run learns from, with its round if the run reads one.

    `split` are its rows; None while it is still being written.
    """

    choice: CacheChoice
    reader: CacheReader
    student_round: Round | None = None
    split: CacheSplit | None = None

    @property
    def finished(self) -> TeacherCache | None:
        """The cache, once it is finished."""
        return self.reader if isinstance(self.reader, TeacherCache) else None

    @property
    def rows(self) -> RowSource:
        """Its rows to train on."""
        assert self.split is not None
        return self.split.training

    def has_distributions(self, config: TrainConfig) -> bool:
        """Whether the responses to learn from have the teacher's distributions."""
        return top_k_of(self.reader, self.student_round, config) > 0


def verify_share(config: TrainConfig, rank: int = 0, num_processes: int = 1) -> None:
    """With `verify` start: check the sha256 of this rank's share of the shards that the run reads.

    The ranks agree on the result before any of them reads a row, so that together they read the caches once. Raises
    `UserError` for a shard that is missing or corrupt. A growing cache checks every shard as it comes.
    """
    if config.follow or config.verify != "start":
        return
    used = [pair for choice in config.caches for pair in _used(_open(choice, config), config)]
    for folder, shard in used[rank::num_processes]:
        check_shard(folder, shard)


def open_caches(config: TrainConfig, student: ModelSource) -> tuple[RunCache, ...]:
    """The caches of `config`, checked against the student and each other; none for a run on data.

    Raises `UserError` for a cache that cannot be used.
    """
    choices = config.caches
    if config.follow:
        cache = open_growing(config)
        check_distributions(cache, None, config)
        found = [RunCache(choices[0], cache)]
    else:
        found = [_open(choice, config) for choice in choices]
        _check_together(found, config)
        finished = [(cache, cache.finished) for cache in found if cache.finished is not None]
        held_out = None
        if len(found) > 1 and config.validation_examples != 0:
            # the same example may be in several caches: it is held out of all of them
            held_out = frozenset().union(*(choose_held_out(cache_examples(of), config) for _, of in finished))
        found = [
            replace(cache, split=open_cache_rows(of, cache.student_round, config, held_out)) for cache, of in finished
        ]
    for run_cache in found:
        if config.student_samples == "live":
            run_cache.reader.check_one_teacher()
        run_cache.reader.check_tokenizer(student, "student")
        check_narrower(student, run_cache.reader, _used(run_cache, config))
    return tuple(found)


def _open(choice: CacheChoice, config: TrainConfig) -> RunCache:
    cache = TeacherCache.open(choice.location)
    return RunCache(choice, cache, None if config.round is None else cache.round(config.round))


def _used(cache: RunCache, config: TrainConfig) -> list[tuple[Folder, ShardRecord]]:
    """The shards of a finished cache, and of its round, that `config` trains on, each with its folder."""
    if cache.finished is None:
        return []
    shards, of_round = cache.finished.shards(config.origin), cache.student_round
    used: list[tuple[Folder, ShardRecord]] = [(cache.finished.folder, shard) for shard in shards]
    if of_round is not None:
        used += [(of_round.folder, of_round.shards_by_path[shard.path]) for shard in shards]
    return used


def _check_together(caches: Sequence[RunCache], config: TrainConfig) -> None:
    """Raise `UserError` unless several caches have one tokenizer and template, and are different ones."""
    for other in caches[1:]:
        for what, advice in (
            ("tokenizer", "Teachers of one run must share their tokenizer: train on one of these caches"),
            ("template", "Build both caches with the same --template"),
        ):
            ours, theirs = (cache.reader.identities[what] for cache in (caches[0], other))
            if ours["sha256"] != theirs["sha256"]:
                raise UserError(
                    f"the caches {caches[0].choice.name} and {other.choice.name} differ in their {what}",
                    found=_identity_text(theirs, other),
                    expected=_identity_text(ours, caches[0]),
                    where=other.reader.folder,
                    advice=advice,
                )
    by_fingerprint: dict[str, RunCache] = {}
    for cache in caches:
        first = by_fingerprint.setdefault(cache.reader.fingerprint, cache)
        if first is not cache:
            raise UserError(
                f"the caches {first.choice.name} and {cache.choice.name} are the same one",
                found=f"fingerprint {cache.reader.fingerprint[:_SHORT]} twice",
                where=cache.reader.folder,
                advice="Give each cache once, with its weight",
            )
    widths = sorted({cache.reader.vocab_size for cache in caches})
    if config.tail == "uniform" and len(widths) > 1:
        raise UserError(
            "--tail uniform spreads the tail over a teacher's tokens, and the teachers differ in their number",
            found=" and ".join(map(str, widths)),
            where=", ".join(cache.choice.name for cache in caches),
            advice="Leave --tail out",
        )


def _identity_text(identity: dict[str, Any], cache: RunCache) -> str:
    name = identity.get("name") or f"{identity['num_tokens']} tokens"
    return f"{identity['sha256'][:_SHORT]} ({name}) of {cache.choice.name}"


def joined_split(caches: Sequence[RunCache]) -> CacheSplit | None:
    """The rows of all caches; None while one is still being written, and for a run on data."""
    splits = [cache.split for cache in caches if cache.split is not None]
    if len(caches) < 2:
        return splits[0] if splits else None
    validating = [(number, split.validation) for number, split in enumerate(splits) if split.validation is not None]
    references = [(number, split.references) for number, split in enumerate(splits) if split.references is not None]
    return CacheSplit(
        JoinedRows([(number, split.training) for number, split in enumerate(splits)]),
        JoinedRows(validating) if validating else None,
        sum(split.held_out for split in splits),
        sum(split.examples for split in splits),
        "; ".join(f"{cache.choice.name}: {split.reason}" for cache, split in zip(caches, splits, strict=True)),
        JoinedRows(references) if references else None,
    )


def keep_distributions(caches: Sequence[RunCache]) -> bool:
    """Whether there are caches, all finished and with the teacher's distributions on their own responses."""
    return bool(caches) and all(cache.finished is not None and cache.reader.top_k > 0 for cache in caches)


def cache_facts(caches: Sequence[RunCache]) -> dict[str, Any]:
    """What the run's files say of its caches: fingerprints, names, weights, template."""
    if not caches:
        return {}
    template = {"template": caches[0].reader.identities["template"]}
    described = []
    for cache in caches:
        of_round = {} if cache.student_round is None else {"round": cache.student_round.manifest.fingerprint}
        described.append({"cache": cache.reader.fingerprint} | of_round)
    if len(caches) == 1:
        return described[0] | template
    named = {
        cache.choice.name: {"weight": cache.choice.weight} | of_cache
        for cache, of_cache in zip(caches, described, strict=True)
    }
    return {"caches": named} | template
