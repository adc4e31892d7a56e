"""`dpkd cache fidelity`: compare a cache with its live teacher, by scoring rows again and with full distributions.

Log-probs are natural logs of the full-vocabulary float32 log-softmax at temperature 1; errors and divergences are in
nats. Every error is reported with a control, the live teacher against itself: the cache is not the cause of an error
that is no larger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dpkd.core.devices import choose_device, explained_out_of_memory
from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource, locate_model
from dpkd.core.progress import Progress, say
from dpkd.teacher_cache.audit.fidelity_measures import CutLoss, Scores, compare, full_distributions, spread
from dpkd.teacher_cache.engines.engine import (
    Engine,
    EngineOptions,
    ResolvedEngine,
    ScoreRequest,
    results_only,
)
from dpkd.teacher_cache.engines.open import check_engine, open_engine, resolve_engine
from dpkd.teacher_cache.store.codec import MAX_ERROR_NATS
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.rows import CachedRow

if TYPE_CHECKING:
    from dpkd.teacher_cache.options.audit import FidelityConfig

_SHORT = 12  # digits shown of a sha256


def spread_rows(cache: TeacherCache, limit: int) -> list[CachedRow]:
    """At most `limit` rows, evenly spaced over the cache in the order of its shards. Always the same ones."""
    num_rows = cache.manifest.counts["rows"]
    if not num_rows:
        raise UserError("the cache has no rows", where=cache.folder)
    number = min(limit, num_rows)
    wanted = [i * num_rows // number for i in range(number)]
    rows, begin = [], 0
    for record in cache.shards():
        inside = [i - begin for i in wanted if begin <= i < begin + record.rows]
        rows += [cache.read(record).row(i) for i in inside]
        begin += record.rows
    return rows


def measure_fidelity(
    config: FidelityConfig, pilot: Callable[[FidelityConfig, TeacherCache], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Score rows of the cache with its live teacher and report how far they differ, as plain JSON.

    Keys: `cache` (location, fingerprint, teacher, tokenizer, engine, top-K, top mass, rows); `live` (engine, dtype);
    `rows`, `positions` and `entries` that were compared; three comparisons as `compare` makes them, the cache against
    the `live` engine and against transformers, and two controls, the live engine against itself in other batches and
    against transformers (`cached_vs_live`, `cached_vs_transformers`, `live_vs_itself`, `live_vs_transformers`);
    `distributions` (None without), means over positions against transformers' full logits as `CutLoss` describes them,
    with `kl_grid` = `kl - kl_cut`; `bound` (None without), whether the largest error of a kept entry against the live
    engine is within half a step of the grid and the larger control (`holds`: None if the controls are too large to
    tell); `size`, bytes of the whole cache; `pilot`, what the function of that name returns: a student's held-out KL at
    each K. It trains, so a higher package gives it.

    Raises `UserError` if the teacher or its tokenizer is not the cache's.
    """
    cache = TeacherCache.open(config.cache)
    teacher = locate_model(config.teacher, "teacher")
    cache.check_teacher(teacher, advice="Give the teacher that the cache was built with")
    cache.check_tokenizer(teacher, "teacher")
    rows = [part for row in spread_rows(cache, config.limit) for part in row.by_span()]
    built_with = cache.identities["generation"]["engine"]
    # a server runs vLLM
    engine = resolve_engine(
        "transformers" if (config.engine, built_with) == ("auto", "transformers") else config.engine
    )
    options = _engine_options(cache, config, engine, rows)
    check_engine(engine, teacher, options, scores=True)

    say(f"starting {engine} with the teacher {config.teacher}")
    with open_engine(engine, teacher, options) as running:
        sorted_order, mixed_order = _two_orders([len(row.asked_ids) + len(row.response_ids) for row in rows])
        live = _score(running, rows, sorted_order, "live scores")
        again = _score(running, rows, mixed_order, "live scores again")
    cached = Scores.joined([Scores(row.response_logprobs, row.distributions) for row in rows])
    advice = "Full distributions need the teacher in transformers: choose --device cpu"
    with explained_out_of_memory("transformers ran out of memory", where=teacher.path, advice=advice):
        full, loss = _score_fully(teacher, rows, options)
    passes = {
        "cached_vs_live": (cached, live),
        "cached_vs_transformers": (cached, full),
        "live_vs_itself": (again, live),
        "live_vs_transformers": (live, full),
    }
    compared = {name: compare(ours, theirs, cache.vocab_size) for name, (ours, theirs) in passes.items()}
    counts = cache.manifest.counts
    return {
        "cache": _cache_facts(cache),
        "live": {"engine": engine, "dtype": options.dtype},
        "rows": len(rows),
        "positions": len(cached.logprobs_T),
        "entries": 0 if cached.distributions is None else len(cached.distributions.ids_E),
        **compared,
        "distributions": loss and _loss_facts(loss),
        "bound": _bound(compared),
        "size": {key: counts[key] for key in ("bytes", "positions", "entries")} | cache.manifest.densities,
        "pilot": None if pilot is None else pilot(config, cache),
    }


def _engine_options(
    cache: TeacherCache, config: FidelityConfig, engine: ResolvedEngine, rows: Sequence[CachedRow]
) -> EngineOptions:
    identities = cache.identities
    return EngineOptions(
        max_length=max(len(row.asked_ids) + len(row.response_ids) for row in rows),
        top_k=cache.top_k,
        dtype=config.dtype or identities["teacher"]["dtype"],
        device=config.device,
        max_num_seqs=config.max_num_seqs,
        top_mass=identities["logprobs"].get("top_mass"),
        engine_args=identities["generation"].get("engine_args") or {} if engine == "vllm" else {},
    )


def _two_orders(lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Two orders of rows with different batches (from five rows on), so that padding and neighbours differ.

    One has the longest first, as when a cache is built. The other takes every fourth of these, four times.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return by_length, [i for first in range(4) for i in by_length[first::4]]


def _score(engine: Engine, rows: Sequence[CachedRow], order: Iterable[int], label: str) -> Scores:
    requests = (ScoreRequest(i, rows[i].asked_ids.tolist(), rows[i].response_ids.tolist()) for i in order)
    found = {}
    with Progress(label, len(rows), "rows") as progress:
        for result in results_only(engine.score(requests)):
            found[result.index] = Scores(result.logprobs_T, result.distributions)
            progress.advance()
    return Scores.joined([found[i] for i in range(len(rows))])


def _score_fully(
    teacher: ModelSource, rows: Sequence[CachedRow], options: EngineOptions
) -> tuple[Scores, CutLoss | None]:
    """Transformers' scores of the rows, and what the kept entries lose (None without entries)."""
    model: Any = teacher.load(options.dtype).eval()
    model.to(choose_device(options.device))
    scores, losses = [], []
    with Progress("full distributions", len(rows), "rows") as progress:
        for row in rows:
            for part, full in full_distributions(model, row.asked_ids.tolist(), row.response_ids.tolist()):
                scores.append(full.scores(row.response_ids[part], options.top_k, options.top_mass))
                if row.distributions is not None:
                    losses.append(full.loss_of(row.distributions.positions(part)))
            progress.advance()
    return Scores.joined(scores), CutLoss.joined(losses) if losses else None


def _cache_facts(cache: TeacherCache) -> dict[str, Any]:
    identities = cache.identities
    teacher, logprobs = identities["teacher"], identities["logprobs"]
    return {
        "location": str(cache.folder),
        "fingerprint": cache.manifest.fingerprint[:_SHORT],
        "teacher": teacher["name"],
        "weights": teacher["weights_sha256"] and teacher["weights_sha256"][:_SHORT],
        "dtype": teacher["dtype"],
        "tokenizer": identities["tokenizer"]["sha256"][:_SHORT],
        "vocab_size": cache.vocab_size,
        "engine": identities["generation"]["engine"],
        "top_k": logprobs["top_k"],
        "top_mass": logprobs.get("top_mass"),
        "rows": cache.manifest.counts["rows"],
    }


def _loss_facts(loss: CutLoss) -> dict[str, Any]:
    kl, kl_cut = float(loss.kl_T.mean()), float(loss.kl_cut_T.mean())
    return {
        "kl": kl,
        "kl_cut": kl_cut,
        "kl_grid": kl - kl_cut,
        "mass_kept": float(loss.mass_kept_T.mean()),
        "tail_error": spread(loss.tail_error_T),
        "total_error": spread(loss.total_error_T),
    }


def _bound(compared: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Whether the error of the kept entries is within half a grid step plus the noise of the live teacher.

    The noise is the larger control, because generation and scoring differ more than two scorings by one engine. If it
    is larger than the grid, it would hide any error of the codec, and the result is unknown.
    """
    errors = {name: comparison["entries"] and comparison["entries"]["max"] for name, comparison in compared.items()}
    if errors["cached_vs_live"] is None:
        return None
    noise = max(errors["live_vs_itself"], errors["live_vs_transformers"])
    error = errors["cached_vs_live"]
    within = error <= MAX_ERROR_NATS + noise
    return {
        "grid_nats": MAX_ERROR_NATS,
        "noise_nats": noise,
        "max_error_nats": error,
        "holds": None if within and noise > MAX_ERROR_NATS else within,
    }
