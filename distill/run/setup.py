"""A training run before its first step: what it is made of, where it stands, how long it is."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpkd.core.errors import UserError
from dpkd.core.files import write_atomic
from dpkd.core.identity import canonical_json, differences, software_versions
from dpkd.core.models import ModelSource, locate_model
from dpkd.core.prompts.templates import PromptEncoder
from dpkd.distill.batches.order import BatchOrder, FollowOrder, RowOrder
from dpkd.distill.batches.token_budget import TokenBatchOrder
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.following import FollowedRows, open_growing
from dpkd.distill.rows.row import RowSource
from dpkd.distill.rows.sources import (
    check_distributions,
    check_lengths,
    check_positions,
    open_cache_rows,
    open_data_rows,
    top_k_of,
    used_shards,
)
from dpkd.distill.rows.vocabulary import check_narrower
from dpkd.teacher_cache.store.reader import CacheReader, Round, TeacherCache

if TYPE_CHECKING:
    from dpkd.distill.rows.corpus import Corpus

#: options that may differ when a run is taken up: where things are, not what they are
_NOT_THE_RUN = {"out", "cache", "student", "device", "teacher_url", "lm_data", "sharding", "resume_from"} | {
    "gradient_checkpointing",
    "share_prompt",
    "compile",
    "tracker",
}
#: how a step's rows are split into forward passes: their number alone is the run's
_SPLIT = {"batch_size", "gradient_accumulation_steps"}


@dataclass(frozen=True)
class Run:
    """What a run is made of, decided before the first step.

    `validation` are rows that are held out of `rows`; `corpus` is the text of the language-model term;
    `has_distributions` says whether the rows carry the teacher's; `cache` is a finished one, and `cache_identities` are
    also those of a cache that is still written.
    """

    config: TrainConfig
    student: ModelSource
    rows: RowSource
    vocab_size: int
    facts: dict[str, Any]
    cache: TeacherCache | None = None
    validation: RowSource | None = None
    corpus: Corpus | None = None
    has_distributions: bool = False
    cache_identities: dict[str, Any] | None = None


def open_run(config: TrainConfig) -> Run:
    """Find and check student and rows; raises `UserError` for what cannot be used. Writes nothing."""
    student = locate_model(config.student, "student")
    facts: dict[str, Any] = {"student": student.identity(config.dtype), "software": software_versions()}
    rows: RowSource
    finished: TeacherCache | None = None
    validation: RowSource | None = None
    held: Round | None = None
    has_distributions = False
    identities: dict[str, Any] | None = None
    if config.cache is not None:
        cache: CacheReader
        if config.follow:
            cache = open_growing(config)
            check_distributions(cache, None, config)
            rows = FollowedRows(cache, config, student.max_positions)
        else:
            cache = finished = TeacherCache.open(config.cache)
            held = None if config.round is None else finished.round(config.round)
            rows, validation = open_cache_rows(finished, held, config)
            if held is not None:
                facts["round"] = held.manifest.fingerprint
        cache.check_tokenizer(student, "student")
        check_narrower(student, cache, [] if finished is None else used_shards(finished, held, config))
        facts |= {"cache": cache.fingerprint, "template": cache.identities["template"]}
        vocab_size, identities = cache.vocab_size, cache.identities
        has_distributions = top_k_of(cache, held, config) > 0
    else:
        encoder = PromptEncoder(student.tokenizer, config.template)
        rows, data_identity = open_data_rows(config, encoder, student)
        facts |= {"data": data_identity, "template": encoder.identity()}
        vocab_size = student.vocab_size
    if not isinstance(rows, FollowedRows):  # they check every shard as it comes
        check_lengths(rows, student.max_positions, where=student.name)
    corpus = None
    if "lm" in config.weights:
        assert config.lm_data is not None  # the config's own check
        from dpkd.distill.rows.corpus import Corpus

        corpus = Corpus(config.lm_data, student.tokenizer, config.lm_length, config.seed)
        check_positions(config.lm_length, student.max_positions, where=student.name)
        facts["corpus"] = corpus.identity
    return Run(config, student, rows, vocab_size, facts, finished, validation, corpus, has_distributions, identities)


def take_up(run_dir: Path, run: Run, num_processes: int) -> bool:
    """Create or take up the run directory; True when the run is complete. Refuses another run's directory.

    A run may go on with another number of processes, or other forward passes, if a step keeps its number of rows.
    """
    config = run.config
    identity = {
        "options": config.model_dump(mode="json", exclude=_NOT_THE_RUN | _SPLIT),
        "rows_per_step": config.batch_size * config.gradient_accumulation_steps * num_processes,
        "passes_per_step": None if config.batch_tokens is None else config.gradient_accumulation_steps * num_processes,
        **{key: value for key, value in run.facts.items() if key != "software"},
    }
    held_path = run_dir / "dpkd-run.json"
    if held_path.is_file():
        held = json.loads(held_path.read_bytes())
        if canonical_json(held) != canonical_json(identity):
            raise UserError(
                f"the output directory holds another run; differing: {'; '.join(differences(held, identity))}",
                where=run_dir,
                advice="Choose another --out, or repeat the options that it was started with",
            )
        return (run_dir / "run.json").is_file()
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UserError("the output holds something else than a run", where=run_dir, advice="Choose another --out")
    write_atomic(held_path, canonical_json(identity))
    write_atomic(run_dir / "dpkd.toml", run.config.to_toml().encode())
    return False


def plan_steps(run: Run, num_processes: int) -> tuple[int, RowOrder]:
    """Number of steps and the order of rows; raises `UserError` when a batch is larger than the data."""
    config = run.config
    global_batch = config.batch_size * config.gradient_accumulation_steps * num_processes
    order: RowOrder
    if isinstance(run.rows, FollowedRows):
        order = FollowOrder(run.rows, config.seed, global_batch, config.batch_size)
    elif config.batch_tokens is not None:
        by_tokens = TokenBatchOrder(
            run.rows.lengths_by_group(),
            config.seed,
            budget=config.batch_tokens,
            sequences=2 if config.needs_pairs else 1,
            micro_batches_per_step=config.gradient_accumulation_steps * num_processes,
        )
        return config.steps or by_tokens.num_steps(config.epochs or 1), by_tokens
    else:
        order = BatchOrder(run.rows.group_sizes, config.seed, global_batch, config.batch_size)
    if global_batch > order.num_rows:
        raise UserError(
            "a step takes more rows than there are",
            found=f"{global_batch} rows a step",
            expected=f"at most {order.num_rows}",
            advice="Lower --batch-size",
        )
    steps = config.steps or math.ceil((config.epochs or 1) * order.num_rows / global_batch)
    return steps, order
