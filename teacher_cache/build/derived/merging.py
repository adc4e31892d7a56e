"""`dpkd cache merge`: a new cache of all rows of several others with one tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dpkd.core.errors import UserError
from dpkd.core.identity import canonical_json, fingerprint
from dpkd.teacher_cache.build.derived.writing import DerivedCache, Piece, Rewrite, lineage_of, write_derived
from dpkd.teacher_cache.options.derive import CacheMergeConfig
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.shards import read_table

if TYPE_CHECKING:
    from dpkd.teacher_cache.store.manifest import Manifest

_SHORT = 12  # digits shown of a sha256
#: keys whose largest value holds for the merged cache
_LIMITS = ("max_prompt_tokens", "max_new_tokens", "num_samples")
Key = tuple[str, str, int]


def merge_caches(config: CacheMergeConfig) -> Manifest:
    """Make the cache `config.out` of the rows of `config.caches`, in this order, or resume it.

    Raises `UserError` for caches that differ in tokenizer, template or columns, for rows of equal key that
    `config.duplicates` does not settle, or if a shard is corrupt.
    """
    return write_derived(plan_merge(config), config.out, config.to_toml())


def plan_merge(config: CacheMergeConfig) -> DerivedCache:
    """The cache that `config` describes."""
    caches = [TeacherCache.open(location) for location in config.caches]
    _check_together(caches)
    names = [location.rstrip("/").rpartition("/")[2] for location in config.caches]
    rewrites = _rewrites(caches, names, config.duplicates)
    pieces = [
        Piece(cache, record, np.arange(record.rows), rewrite)
        for stem in sorted({stem for cache in caches for stem in cache.stems})
        for cache, rewrite in zip(caches, rewrites, strict=True)
        for record in cache.shards(stem=stem)
    ]
    parents = [lineage_of(cache) for cache in caches]
    lineage: dict[str, Any] = {"operation": "merge", "duplicates": config.duplicates, "parents": parents}
    if config.duplicates == "rename":
        lineage["names"] = names
    return DerivedCache(caches, pieces, _merged([cache.identities for cache in caches]) | {"lineage": lineage})


def _check_together(caches: Sequence[TeacherCache]) -> None:
    """Raise `UserError` unless all caches have one tokenizer, template, kept columns and meaning of log-probs."""
    first = caches[0]
    for other in caches[1:]:
        for what, key, advice in (
            (
                "tokenizer",
                _short_of("tokenizer"),
                "Rows of two tokenizers cannot be in one cache: train on one of them",
            ),
            ("template", _short_of("template"), "Build both caches with the same --template"),
            (
                "kept columns",
                _columns,
                "Build both caches with distributions (--top-k) or both without, from data of one form",
            ),
            ("log-probs", _logprobs, "Train on both caches at once: dpkd train --cache A=0.5 --cache B=0.5"),
        ):
            expected, found = key(first), key(other)
            if expected != found:
                raise UserError(
                    f"the caches differ in their {what}",
                    found=f"{found} of {other.folder}",
                    expected=f"{expected} of {first.folder}",
                    advice=advice,
                )
    seen: dict[str, TeacherCache] = {}
    for cache in caches:
        content = lineage_of(cache)["content"]
        if content in seen:
            raise UserError(
                "two of the caches have the same rows",
                found=f"{seen[content].folder} and {cache.folder}",
                advice="Give each cache once",
            )
        seen[content] = cache


def _short_of(key: str) -> Callable[[TeacherCache], str]:
    return lambda cache: str(cache.identities[key]["sha256"])[:_SHORT]


def _columns(cache: TeacherCache) -> str:
    kept = "distributions" if cache.top_k else "no distributions"
    return ", ".join([kept, *cache.identities["layout"].get("columns", ())])


def _logprobs(cache: TeacherCache) -> str:
    meaning = {key: value for key, value in cache.identities["logprobs"].items() if key not in ("top_k", "top_mass")}
    return canonical_json(meaning).decode()


def _rewrites(caches: Sequence[TeacherCache], names: Sequence[str], duplicates: str) -> list[Rewrite | None]:
    """What becomes of the ids of each cache's rows; raises `UserError` for equal keys that stay."""
    if duplicates == "rename":
        repeated = [name for name in names if names.count(name) > 1]
        if repeated:
            raise UserError(
                "two of the caches have the same name, so it cannot tell their examples apart",
                found=repeated[0],
                advice="Rename one of the directories",
            )
        return [_renamed(name) for name in names]
    seen: dict[Key, TeacherCache] = {}
    next_sample: dict[tuple[str, str], int] = {}
    prompts: dict[tuple[str, str], str] = {}
    rewrites: list[Rewrite | None] = []
    repeated_keys: list[tuple[Key, TeacherCache, TeacherCache]] = []
    for cache in caches:
        before = dict(next_sample)
        for stem, example_id, sample, prompt in _keys(cache, with_prompts=duplicates == "renumber"):
            example = (stem, example_id)
            if duplicates == "renumber":
                if prompts.setdefault(example, prompt) != prompt:
                    raise UserError(
                        "two caches have the same example id for different prompts, so its responses are not of one "
                        "example",
                        found=example_id,
                        where=cache.folder,
                        advice="Give --duplicates rename",
                    )
                sample += before.get(example, 0)
                next_sample[example] = max(next_sample.get(example, 0), sample + 1)
                continue
            owner = seen.setdefault((stem, example_id, sample), cache)
            if owner is not cache:
                repeated_keys.append(((stem, example_id, sample), owner, cache))
        rewrites.append(_renumbered(before) if duplicates == "renumber" and before else None)
    if repeated_keys:
        (_, example_id, sample), owner, cache = repeated_keys[0]
        raise UserError(
            f"{len(repeated_keys)} rows of one cache have the example id and sample of rows of another",
            found=f"{example_id}, sample {sample}, in {owner.folder} and {cache.folder}",
            advice="Give --duplicates renumber if they are more responses to the same prompts, or rename if the ids "
            "mean other examples",
        )
    return rewrites


def _keys(cache: TeacherCache, *, with_prompts: bool) -> list[tuple[str, str, int, str]]:
    """Stem, example id, sample, and (if asked) a hash of the prompt of every row."""
    columns = ["example_id", "sample", *(["prompt_ids"] if with_prompts else [])]
    keys = []
    for record in cache.manifest.shards:
        table = read_table(cache.folder, record, columns)
        prompts = (
            [fingerprint(ids) for ids in table["prompt_ids"].to_pylist()] if with_prompts else [""] * table.num_rows
        )
        rows = zip(table["example_id"].to_pylist(), table["sample"].to_pylist(), prompts, strict=True)
        keys += [(record.stem, *row) for row in rows]
    return keys


def _renamed(name: str) -> Rewrite:
    def rewrite(_: str, table: pa.Table) -> pa.Table:
        ids = [f"{name}/{example_id}" for example_id in table["example_id"].to_pylist()]
        return _with_column(table, "example_id", ids)

    return rewrite


def _renumbered(next_sample: dict[tuple[str, str], int]) -> Rewrite:
    def rewrite(stem: str, table: pa.Table) -> pa.Table:
        rows = zip(table["example_id"].to_pylist(), table["sample"].to_pylist(), strict=True)
        return _with_column(
            table, "sample", [sample + next_sample.get((stem, example_id), 0) for example_id, sample in rows]
        )

    return rewrite


def _with_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    index = table.schema.get_field_index(name)
    field = table.schema.field(index)
    return table.set_column(index, field, pa.array(values, field.type))


def _merged(identities: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the merged cache says that it is: what all parents say, and otherwise what holds for all their rows."""
    logprobs = _common([one["logprobs"] for one in identities])
    logprobs["top_k"] = max(int(one["logprobs"]["top_k"]) for one in identities)
    if logprobs.get("top_mass", 0) is None:
        del logprobs["top_mass"]
    rows_per_shard = [int(one["layout"]["rows_per_shard"]) for one in identities]
    generation = _common([one["generation"] for one in identities])
    for key in _LIMITS:
        generation[key] = max(int(one["generation"][key]) for one in identities)
    generation["responses"] = generation["responses"] or "both"
    return {
        "teacher": _merged_teacher([one["teacher"] for one in identities]),
        "tokenizer": identities[0]["tokenizer"],
        "template": identities[0]["template"],
        "data": _merged_data([one["data"] for one in identities]),
        "generation": generation,
        "logprobs": logprobs,
        # the shards of a cache of long rows have few of them, because a shard has a largest size
        "layout": identities[0]["layout"] | {"rows_per_shard": min(rows_per_shard)},
    }


def _common(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every key of any of `parts`; None where they differ, or where one has no such key."""
    keys = dict.fromkeys(key for part in parts for key in part)
    return {
        key: parts[0].get(key) if all(part.get(key) == parts[0].get(key) for part in parts) else None for key in keys
    }


def _merged_teacher(teachers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The one teacher, or a description of several that no model is equal to."""
    different = list(
        {canonical_json(one): one for teacher in teachers for one in teacher.get("several", [teacher])}.values()
    )
    if len(different) == 1:
        return different[0]
    widest = max(int(teacher["vocab_size"]) for teacher in different)
    unknown = dict.fromkeys(different[0])
    common = _common(different)
    name = " + ".join(dict.fromkeys(str(teacher["name"]) for teacher in different))
    return unknown | {"name": name, "dtype": common.get("dtype"), "vocab_size": widest, "several": different}


def _merged_data(data: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if all(one == data[0] for one in data):
        return data[0]
    name = " + ".join(dict.fromkeys(str(one["name"]) for one in data))
    return {"name": name, "sha256": fingerprint(list(data)), "limit": None, "parts": list(data)}
