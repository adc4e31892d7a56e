"""What a cache and a round have in common: engine options, identities, and the line at the end."""

from __future__ import annotations

from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.progress import say
from dpkd.teacher_cache.engines.engine import EngineOptions, ResolvedEngine, Sampling
from dpkd.teacher_cache.engines.vllm.engine_args import result_changing
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.codec import GRID_NATS
from dpkd.teacher_cache.store.manifest import Manifest

_MOST_ENTRIES = 2**31 - 1  # offsets of Arrow lists are int32


def say_complete(what: str, manifest: Manifest) -> None:
    """Print one line for a complete cache or round, and its first failed rows."""
    counts = manifest.counts
    say(f"{what} is complete: {counts['rows']} rows, {counts['positions']} tokens, {counts['bytes']} bytes")
    if not manifest.failed:
        return
    say(f"{counts['failed']} rows failed (all are listed in the manifest, with the reason):")
    for row in manifest.failed[:5]:
        say(f"  {row['origin']} {row['example_id']}, sample {row['sample']}: {row['reason']}")


def check_shard_size(config: CacheConfig, num_rows: int) -> None:
    """Raise `UserError` if a shard of at most `num_rows` rows could have more entries than Parquet lists can count."""
    rows = min(config.rows_per_shard, num_rows)
    entries = rows * config.max_new_tokens * max(config.most_entries, 1)
    if entries > _MOST_ENTRIES:
        raise UserError(
            "a shard could become too large",
            found=f"{entries} entries ({rows} rows of {config.max_new_tokens} tokens, {config.most_entries} each)",
            expected=f"at most {_MOST_ENTRIES}",
            where="option 'rows_per_shard'",
            advice=f"Give --rows-per-shard {max(rows * _MOST_ENTRIES // entries, 1)} or less",
        )


def engine_options(config: CacheConfig, top_k: int | None = None) -> EngineOptions:
    """The engine's options in `config`, with another `top_k` if given."""
    return EngineOptions(
        max_length=config.max_prompt_tokens + config.max_new_tokens,
        top_k=config.most_entries if top_k is None else top_k,
        dtype=config.dtype,
        device=config.device,
        max_num_seqs=config.max_num_seqs,
        top_mass=config.top_mass,
        engine_args=config.engine_arg,
        server_urls=config.server_url,
    )


def sampling(config: CacheConfig, stop_token_ids: list[int]) -> Sampling:
    """The sampling options in `config`."""
    return Sampling(config.temperature, config.top_p, config.max_new_tokens, tuple(stop_token_ids))


def logprobs_identity(config: CacheConfig) -> dict[str, Any]:
    """How log-probs are computed and stored. `top_mass` is a key only if it decides the number of entries."""
    picked = {} if config.top_mass is None else {"top_mass": config.top_mass}
    return {
        "mode": "raw_logprobs" if config.engine != "openai" or config.most_entries else "none",
        "temperature": 1.0,
        "unit": "nats",
        "top_k": config.most_entries,
        "entry_grid_nats": GRID_NATS,
        **picked,
    }


def engine_identity(engine: ResolvedEngine, config: CacheConfig) -> dict[str, Any]:
    """The engine and its arguments that can change a result; a Ray cluster runs vLLM."""
    changing = result_changing(config.engine_arg)
    return {"engine": "vllm" if engine == "ray" else engine} | ({"engine_args": changing} if changing else {})
