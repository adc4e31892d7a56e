"""`dpkd cache filter`: a new cache of those rows of another that meet all conditions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpkd.core.errors import UserError
from dpkd.core.option_errors import did_you_mean
from dpkd.core.progress import Progress, say
from dpkd.teacher_cache.build.derived.writing import DerivedCache, Piece, lineage_of, write_derived
from dpkd.teacher_cache.options.derive import CONDITION, CacheFilterConfig
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.shards import read_table
from dpkd.teacher_cache.store.tables import mean_logprobs

if TYPE_CHECKING:
    from dpkd.teacher_cache.store.manifest import Manifest

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": pc.equal, "!=": pc.not_equal, "<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal,
}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """A condition: its text, the columns that it reads, and the rows of a table that meet it."""

    text: str
    columns: tuple[str, ...]
    holds: Callable[[pa.Table], np.ndarray]


def filter_cache(config: CacheFilterConfig) -> Manifest:
    """Make the cache `config.out` of the rows of `config.cache` that meet every condition, or resume it.

    Prints how many rows remain, and how many each condition removed (a row counts for the first one that it fails).
    Raises `UserError` for a column that cannot be compared, if no row remains, or if a shard is corrupt.
    """
    derived, removed = plan_filter(config)
    total, kept = derived.parents[0].manifest.counts["rows"], sum(derived.num_rows.values())
    say(f"{kept} of {total} rows of {config.cache} remain ({kept / total:.1%})")
    for text, number in removed.items():
        say(f"  {number} removed by {text}")
    if not kept:
        advice = "Loosen the conditions; nothing was written"
        raise UserError("no row is left for the new cache", found="0 rows", where=config.cache, advice=advice)
    return write_derived(derived, config.out, config.to_toml())


def plan_filter(config: CacheFilterConfig) -> tuple[DerivedCache, dict[str, int]]:
    """The cache that `config` describes, and the rows that each condition removes."""
    cache = TeacherCache.open(config.cache)
    rules = _rules(config, cache)
    columns = list(dict.fromkeys(["sample", *(name for rule in rules for name in rule.columns)]))
    removed = dict.fromkeys((rule.text for rule in rules), 0)
    pieces = []
    with Progress("check", cache.manifest.counts["rows"], "rows") as progress:
        for record in cache.manifest.shards:
            table = read_table(cache.folder, record, columns)
            kept = np.ones(table.num_rows, bool)
            for rule in rules:
                holds = rule.holds(table)
                removed[rule.text] += int((kept & ~holds).sum())
                kept &= holds
            pieces.append(Piece(cache, record, np.flatnonzero(kept)))
            progress.advance(table.num_rows)
    lineage = {"operation": "filter", "filter": config.rules, "removed": removed, "parents": [lineage_of(cache)]}
    own = {key: value for key, value in cache.identities.items() if key != "lineage"}
    return DerivedCache([cache], pieces, own | {"lineage": lineage}), removed


def _rules(config: CacheFilterConfig, cache: TeacherCache) -> list[Rule]:
    rules = []
    if config.min_tokens is not None:
        least = config.min_tokens
        rules.append(Rule(f"--min-tokens {least}", ("response_ids",), lambda table: _lengths(table) >= least))
    if config.max_tokens is not None:
        most = config.max_tokens
        rules.append(Rule(f"--max-tokens {most}", ("response_ids",), lambda table: _lengths(table) <= most))
    if config.finish_reason is not None:
        rules.append(
            _condition(f"finish_reason == {config.finish_reason}", cache, f"--finish-reason {config.finish_reason}")
        )
    if config.min_logprob is not None:
        _check_logprobs(cache)
        lowest = config.min_logprob
        rules.append(
            Rule(
                f"--min-logprob {lowest:g}",
                ("response_logprobs", "finish_reason"),
                lambda table: mean_logprobs(table, ends_known=cache.ends_known) >= lowest,
            )
        )
    rules += [_condition(text, cache, f"--where {text!r}") for text in config.where]
    return rules


def _lengths(table: pa.Table) -> np.ndarray:
    lengths: np.ndarray = pc.list_value_length(table["response_ids"]).to_numpy()
    return lengths


def _check_logprobs(cache: TeacherCache) -> None:
    if cache.identities["logprobs"].get("responses") == "unknown":
        raise UserError(
            "the cache does not know the log-probs of its responses, which --min-logprob needs",
            found="texts alone",
            where=cache.folder,
            advice="Leave --min-logprob out",
        )


def _condition(text: str, cache: TeacherCache, option: str) -> Rule:
    """The rule of `column op value`, compared by Arrow; raises `UserError` for what cannot be compared."""
    match = CONDITION.fullmatch(text)
    assert match is not None  # checked by the config
    column, compare, value = match.groups()
    schema = read_table(cache.folder, cache.manifest.shards[0]).schema
    known = [field.name for field in schema if not pa.types.is_list(field.type)]
    if column not in known:
        is_list = column in schema.names
        raise UserError(
            f"{option}: the column is a list, which has no order"
            if is_list
            else f"{option}: the cache has no such column",
            found=column,
            expected=f"one of {', '.join(known)}",
            where=cache.folder,
            advice="Use --min-tokens, --max-tokens or --min-logprob" if is_list else did_you_mean(column, known),
        )
    kind = schema.field(column).type
    holds: Callable[[pa.ChunkedArray], Any]
    if compare == "contains":
        if not pa.types.is_string(kind):
            raise UserError(
                f"{option}: only text contains something", found=f"{column} of type {kind}", where=cache.folder
            )
        holds = partial(pc.match_substring, pattern=_unquoted(value))
    elif compare == "in":
        values = [_scalar(part, kind, option) for part in value.split(",")]
        holds = partial(pc.is_in, value_set=pa.array([scalar.as_py() for scalar in values], kind))
    else:
        scalar = _scalar(value, kind, option)
        holds = lambda values: _COMPARE[compare](values, scalar)  # noqa: E731
    return Rule(option, (column,), lambda table: pc.fill_null(holds(table[column]), False).to_numpy())


def _scalar(text: str, kind: pa.DataType, option: str) -> pa.Scalar:
    try:
        return pa.scalar(_unquoted(text.strip())).cast(kind)
    except pa.ArrowInvalid:
        raise UserError(f"{option}: the value does not fit the column", found=text, expected=str(kind)) from None


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
