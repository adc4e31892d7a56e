"""`dpkd cache repair`: make the bad shards of a finished cache and its rounds again, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.progress import Progress, say
from dpkd.core.settings import SAVED_OPTIONS
from dpkd.teacher_cache.build.assembling import ShardLayout
from dpkd.teacher_cache.build.cache import cache_identities, earlier_answers, fill_cache, open_inputs
from dpkd.teacher_cache.build.derived.filtering import plan_filter
from dpkd.teacher_cache.build.derived.merging import plan_merge
from dpkd.teacher_cache.build.derived.writing import DerivedCache, fill_derived
from dpkd.teacher_cache.build.plan import RowPlan
from dpkd.teacher_cache.build.round_options import OF_PROMPTS
from dpkd.teacher_cache.build.rounds import discard_stages, fill_round, open_round, round_identities
from dpkd.teacher_cache.options.cache import OF_DRAWING, CacheConfig
from dpkd.teacher_cache.options.derive import CacheFilterConfig, CacheMergeConfig
from dpkd.teacher_cache.store.folder import Folder
from dpkd.teacher_cache.store.folders import open_folder
from dpkd.teacher_cache.store.job import read_saved_options
from dpkd.teacher_cache.store.ledger import bad_shards
from dpkd.teacher_cache.store.manifest import Manifest, changed_identities, load_manifest
from dpkd.teacher_cache.store.reader import CACHE_KIND, ROUND_KIND, TeacherCache, round_folder
from dpkd.teacher_cache.store.repairing import RepairJob, has_leftovers
from dpkd.teacher_cache.store.shards import ShardRecord, read_shard, refuse_newer_fields

_ADVICE = "Restore it: a repair needs the options that the cache was built with"


@dataclass(frozen=True)
class Repaired:
    """Shards of cache and rounds, how many were bad, and how many of those have other bytes than the lost ones."""

    shards: int
    bad: int
    different: int


@dataclass
class _Part:
    """The cache, or one of its rounds."""

    folder: Folder
    manifest: Manifest
    bad: list[ShardRecord]

    @property
    def depends_on_responses(self) -> bool:
        """Whether its shards contain something about the cache's responses, and not only about its prompts."""
        return bool(self.manifest.identities["generation"].get("score_cached"))

    def also_remake(self, path: str) -> None:
        """Delete a shard, which is bad then, also for a repair that follows if this one is killed."""
        if path not in {record.path for record in self.bad}:
            self.bad.append(next(record for record in self.manifest.shards if record.path == path))
        self.folder.delete(path)


def repair_cache(location: str) -> Repaired:
    """Make the shards that are missing or have another checksum again, with the options and models of the cache.

    The rows are those that were lost, because order and seeds depend on nothing else. Their bytes are the same too if
    the engine computes the same in another batch. If not, the manifest gets the new checksum.

    Raises:
        UserError: the cache is not finished; its data, models or options are not those that it was built from; another
            job writes to it; or the engine fails. Shards that were made again are kept.
    """
    folder = open_folder(location)
    cache = _Part(folder, load_manifest(folder, CACHE_KIND), [])
    names = TeacherCache(folder, cache.manifest).round_names
    rounds = [_Part(part, load_manifest(part, ROUND_KIND), []) for part in (round_folder(folder, n) for n in names)]
    parts = [cache, *rounds]
    num_shards = sum(len(part.manifest.shards) for part in parts)
    with Progress("check", num_shards, "shards") as progress:
        for part in parts:
            part.bad = bad_shards(part.folder, part.manifest.shards, progress)
    different = _repair_cache(cache, rounds, location)
    for part in rounds:
        different += _repair_round(part, cache, location)
    return Repaired(num_shards, sum(len(part.bad) for part in parts), different)


def _repair_cache(cache: _Part, rounds: list[_Part], location: str) -> int:
    """Returns the number of shards that have other bytes than before."""
    job = RepairJob(cache.folder, cache.manifest, cache.bad, _settled(cache.manifest))
    if not cache.bad:
        return _without_bad(job)
    fill = _filler(cache, job, location)
    with job.repairing():
        _say_bad(job)
        fill()
        remade = job.remade()
        changed = job.changed()
        for part in rounds:
            for path, record in changed.items():
                if part.depends_on_responses or record.rows != job.bad[path].rows:
                    part.also_remake(path)
        job.replace_records(remade)
    cache.manifest, cache.bad = job.manifest, list(job.bad.values())
    return len(changed)


def _filler(cache: _Part, job: RepairJob, location: str) -> Callable[[], None]:
    """What makes the cache's bad shards again; raises `UserError` unless it is made of what the cache was made of."""
    values = _saved_values(cache.folder, location)
    lineage = cache.manifest.identities.get("lineage")
    if lineage is not None:
        derived = _DERIVED[lineage["operation"]](values, cache.folder.where(SAVED_OPTIONS))
        _refuse_other(cache, derived.identities)
        return lambda: fill_derived(job, derived)
    config = _cache_config(values, cache.folder)
    inputs = open_inputs(config, cache.folder)
    _refuse_other(cache, cache_identities(inputs))
    job.check_source = inputs.source.check_unchanged

    def fill() -> None:
        fill_cache(inputs, job)
        while job.changed() and (stale := _stale_turns(config, inputs.plan, job)):
            job.also_remake(stale)
            fill_cache(inputs, job)

    return fill


def _stale_turns(config: CacheConfig, plan: RowPlan, job: RepairJob) -> list[str]:
    """Shards of later turns of conversations whose prompts have other answers than the shards of earlier turns now."""
    stale = []
    for part, _ in plan.survey.in_order():
        if part.turn == 1:
            continue
        layout = ShardLayout(part.origin, config.rows_per_shard, part.stem)
        rows = plan.rows(part, earlier_answers(job))
        for number, members in itertools.groupby(rows, lambda row: row.index // config.rows_per_shard):
            record = job.committed[layout.path(number)]
            shard = read_shard(job.folder, record)
            failed = {(row["example_id"], row["sample"]) for row in record.failed}
            planned = {(row.example_id, row.sample): list(row.prompt_ids) for row in members if row.failed is None}
            prompts = {shard.key(index): shard.row(index).prompt_ids.tolist() for index in range(len(shard))}
            if prompts != {key: ids for key, ids in planned.items() if key not in failed}:
                stale.append(record.path)
    return stale


#: how a cache that was made of others is planned again, by its operation, from the values of its saved options
_DERIVED: dict[str, Callable[[dict[str, Any], str], DerivedCache]] = {
    "merge": lambda values, where: plan_merge(CacheMergeConfig.parse(values, where=where)),
    "filter": lambda values, where: plan_filter(CacheFilterConfig.parse(values, where=where))[0],
}


def _repair_round(part: _Part, cache: _Part, location: str) -> int:
    job = RepairJob(part.folder, part.manifest, part.bad, {shard.path: shard.rows for shard in cache.manifest.shards})
    if not part.bad:
        return _without_bad(job)
    opened = TeacherCache.open(location)
    values = _saved_values(part.folder, location)
    inputs = open_round(opened, _cache_config(values, part.folder, OF_PROMPTS))
    _refuse_other(part, round_identities(opened, inputs))
    with job.repairing():
        _say_bad(job)
        fill_round(opened, inputs, job)
        remade = job.remade()
        changed = [path for path, record in remade.items() if record != job.bad[path]]
        job.replace_records(remade)
        discard_stages(job)
    return len(changed)


def _settled(manifest: Manifest) -> dict[str, int]:
    return {record.path: record.num_settled for record in manifest.shards}


def _without_bad(job: RepairJob) -> int:
    if has_leftovers(job.folder):
        with job.repairing():
            job.replace_records({})
    return 0


def _say_bad(job: RepairJob) -> None:
    for path in job.bad:
        how = "was made again by an earlier repair" if path in job.committed else "is bad: its rows are made again"
        say(f"{job.folder.where(path)} {how}")
    say(f"bad shards are made again with the models, data and options of {job.folder.where(SAVED_OPTIONS)}")


def _saved_values(folder: Folder, location: str) -> dict[str, Any]:
    """The saved options of a cache that is at `location` now, or of one of its rounds."""
    return {**read_saved_options(folder, _ADVICE), "out": location}


def _cache_config(values: Mapping[str, Any], folder: Folder, without: Sequence[str] = ()) -> CacheConfig:
    """The options that the cache or round in `folder` was built with, from its saved `values`.

    Earlier versions saved options that they did not read. Those in `without` are left out; those of sampling where
    nothing is drawn are part of the cache's identity and stay.
    """
    where = folder.where(SAVED_OPTIONS)
    refuse_newer_fields(values, CacheConfig.model_fields, where)
    read = {key: value for key, value in values.items() if key not in without}
    unread = {}
    if read.get("responses") == "reference" and "round" not in read:
        unread = {key: read.pop(key) for key in OF_DRAWING if key in read}
    return CacheConfig.parse(read, where=where).model_copy(update=unread)


def _refuse_other(part: _Part, identities: dict[str, Any]) -> None:
    if changed := changed_identities(part.manifest.identities, identities):
        raise UserError(
            f"the bad shards cannot be made again from what is here now; differing: {'; '.join(changed)}",
            where=part.folder,
            advice=f"Restore what differs (its path is in {SAVED_OPTIONS}), or build the cache again",
        )
