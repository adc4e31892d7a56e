"""A training run before its first step: what it is made of, how long it is, and the directory that it claims."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from dpkd.core.errors import UserError
from dpkd.core.files import write_atomic
from dpkd.core.identity import canonical_json, software_versions
from dpkd.core.models import ModelSource, locate_model
from dpkd.core.outputs import LOCK, lock_directory, output_exists
from dpkd.core.progress import say
from dpkd.core.prompts.templates import PromptEncoder
from dpkd.core.settings import SAVED_OPTIONS
from dpkd.distill.batches.order import BatchOrder, FollowOrder, MixedOrder, RowOrder
from dpkd.distill.batches.shares import CacheShares, open_shares, shares_note
from dpkd.distill.batches.token_budget import TOKEN_ORDER, TokenBatchOrder
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.caches import RunCache, cache_facts, joined_split, keep_distributions, open_caches
from dpkd.distill.rows.data import open_data_rows
from dpkd.distill.rows.following import FollowedRows
from dpkd.distill.rows.row import RowSource
from dpkd.distill.rows.sources import check_lengths, check_positions
from dpkd.distill.rows.views import MixedRows
from dpkd.distill.run.adapters import check_adapters
from dpkd.distill.run.plan import ValidationPlan, plan_validation, tail_note
from dpkd.distill.run.ranks import on_rank_zero
from dpkd.teacher_cache.store.growing import GrowingCache

if TYPE_CHECKING:
    from dpkd.distill.rows.corpus import Corpus

#: options that may differ when a run is resumed: they say where things are, what is kept and checked, or how fast it
#: runs, not what it computes
_FREE_OPTIONS = {
    *("out", "cache", "data", "student", "device", "teacher_url", "lm_data", "sharding", "resume_from"),
    *("gradient_checkpointing", "share_prompt", "compile", "tracker"),
    *("save_every", "keep_checkpoints", "verify", "follow_timeout_s"),
}
#: options whose default is not what versions without them did: all pairs, no dropout where log-probs are compared, and
#: MiniLLM's ratio with its clip
_CHANGED_RESULTS = {"token_pairs", "dropout", "minillm_clip"}
#: how a step's rows are split into micro-batches; only their product belongs to the run
_SPLIT = {"batch_size", "gradient_accumulation_steps"}


@dataclass(frozen=True)
class Run:
    """What a run is made of, decided before the first step.

    Attributes:
        rows: what to learn from, in the `order` of `steps` steps.
        validation: what is held out of `rows`, when it is measured, and what for.
        corpus: text of the language-model term.
        has_distributions: whether the rows have the teacher's distributions.
        vocab_size: width of the teacher's logits, or of the student's without a teacher.
        facts: what the student is made of, as dpkd.json records it.
        caches: what it learns from; none for a run on data.
        shares: how the rows of several caches follow each other.
    """

    config: TrainConfig
    student: ModelSource
    rows: RowSource
    order: RowOrder
    steps: int
    vocab_size: int
    facts: dict[str, Any]
    validation: ValidationPlan
    caches: tuple[RunCache, ...] = ()
    shares: CacheShares | None = None
    corpus: Corpus | None = None
    has_distributions: bool = False

    @property
    def keeps_distributions(self) -> bool:
        """Whether every cache is finished and keeps the teacher's distributions on its own responses."""
        return keep_distributions(self.caches)

    @property
    def max_new_tokens(self) -> int:
        """Longest response that any of the caches may have, in tokens."""
        return max(int(cache.reader.identities["generation"]["max_new_tokens"]) for cache in self.caches)

    def epochs(self, step: int) -> dict[str, int]:
        """The epoch (from 0) of the first row of `step`; of several caches also `epoch/NAME`, the epoch of each."""
        epochs = {"epoch": self.order.epoch_of(step)}
        if self.shares is None:
            return epochs
        counts = self.shares.rows_before(self.order.position_of(step))
        sizes = zip(self.caches, counts, self.shares.sizes, strict=True)
        return epochs | {f"epoch/{cache.choice.name}": count // size for cache, count, size in sizes}


def open_run(config: TrainConfig, num_processes: int = 1) -> Run:
    """Find and check student and rows, after `verify_share`; raises `UserError` for what cannot be used.

    Writes nothing.
    """
    student = locate_model(config.student, "student")
    check_adapters(student, config)
    facts: dict[str, Any] = {"student": student.whole_identity(config.dtype), "software": software_versions()}
    rows: RowSource
    caches = open_caches(config, student)
    split = joined_split(caches)
    if caches:
        growing = caches[0].reader
        if isinstance(growing, GrowingCache):
            rows = FollowedRows(growing, config, student.max_positions)
        else:
            assert split is not None
            rows = split.training if config.mix is None else MixedRows(split.training)
        facts |= cache_facts(caches)
        vocab_size = max(cache.reader.vocab_size for cache in caches)
    else:
        encoder = PromptEncoder(student.tokenizer, config.template, config.template_arg)
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
    shares = open_shares(caches, config)
    order, steps = _plan_steps(config, rows, shares, num_processes, 0 if split is None else split.held_out)
    if config.mix is not None:
        assert isinstance(rows, MixedRows)
        order = MixedOrder(order, rows, config.mix, config.seed)
    validation = plan_validation(config, split, steps, order.rows_per_step, has_kl=keep_distributions(caches))
    if validation.rows is not None:
        facts["validation"] = validation.facts
    return Run(
        config=config,
        student=student,
        rows=rows,
        order=order,
        steps=steps,
        vocab_size=vocab_size,
        facts=facts,
        validation=validation,
        caches=caches,
        shares=shares,
        corpus=corpus,
        has_distributions=bool(caches) and all(cache.has_distributions(config) for cache in caches),
    )


@contextlib.contextmanager
def claim_directory(run: Run, accelerator: Accelerator) -> Iterator[bool]:
    """Create the run directory, or reopen it to resume, and keep other jobs out of it while the block runs.

    The block gets True when the run is complete. Every rank calls it; rank zero holds the lock. Raises `UserError` when
    another job is writing to the directory, or it holds another run.
    """
    out, identity = run.config.out, _identity(run, accelerator.num_processes)
    advice = "Choose another --out, or repeat the options that the run was started with"
    if run.config.batch_tokens is not None:
        advice += "; where token_order differs, another version of dpkd began the run: only that one can resume it"

    def is_run() -> bool:
        ignore = frozenset({"token_order"}) if (out / "run.json").is_file() else frozenset[str]()
        return output_exists(out, "dpkd-run.json", identity, "run", ignore=ignore, upgraded=_upgraded, advice=advice)

    def is_complete() -> bool:
        return is_run() and (out / "run.json").is_file()

    def claim() -> bool:
        if is_complete():  # it may be a read-only copy, which cannot be locked
            return True
        stack.enter_context(lock_directory(out, LOCK))
        if not is_run():
            write_atomic(out / "dpkd-run.json", canonical_json(identity))
            for note in _notes(run):
                say(note)
        if not (out / SAVED_OPTIONS).is_file():  # a process may have been killed between the two
            write_atomic(out / SAVED_OPTIONS, run.config.to_toml().encode())
        return is_complete()  # another job may have completed it just before it gave the lock back

    with contextlib.ExitStack() as stack:
        yield on_rank_zero(accelerator, claim)


def _identity(run: Run, num_processes: int) -> dict[str, Any]:
    """What a run must have in common with the one that it resumes.

    It may resume with another number of processes or other micro-batches if a step keeps its number of rows. One of
    `batch_tokens` also needs the order of rows that it was begun in, until it is complete.
    """
    config = run.config
    rows_per_step = config.batch_size * config.gradient_accumulation_steps * num_processes
    return {
        "options": config.model_dump(mode="json", exclude=_FREE_OPTIONS | _SPLIT),
        "rows_per_step": rows_per_step,
        "passes_per_step": None if config.batch_tokens is None else config.gradient_accumulation_steps * num_processes,
        "token_order": None if config.batch_tokens is None else TOKEN_ORDER,  # None also in runs of older versions
        **{key: value for key, value in run.facts.items() if key != "software"},
    }


def _upgraded(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a run of an earlier version as one of this: with the defaults of new options, without free ones."""
    fields = TrainConfig.model_fields.items()
    new = {key: field.get_default() for key, field in fields if not field.is_required()}
    new |= dict.fromkeys(_CHANGED_RESULTS, "as an earlier version")
    options = json.loads(canonical_json(new)) | record.get("options", {})
    return record | {"options": {key: options[key] for key in options if key not in _FREE_OPTIONS | _SPLIT}}


def _notes(run: Run) -> Iterator[str]:
    """What a person should know before the first step."""
    if run.shares is not None:
        yield shares_note(run.caches, run.shares, run.steps * run.order.rows_per_step)
    if run.validation.note is not None:
        yield run.validation.note
    for cache in run.caches:
        if cache.split is not None and (note := tail_note(run.config, cache.rows)) is not None:
            yield note if len(run.caches) == 1 else f"{cache.choice.name}: {note}"


def _plan_steps(
    config: TrainConfig, rows: RowSource, shares: CacheShares | None, num_processes: int, held_out: int
) -> tuple[RowOrder, int]:
    """The order of rows and the number of steps; raises `UserError` when a step takes more rows than there are."""
    micro_batches = config.gradient_accumulation_steps * num_processes
    global_batch = config.batch_size * micro_batches
    order: RowOrder
    if isinstance(rows, FollowedRows):
        order = FollowOrder(rows, config.seed, global_batch, config.batch_size)
    elif config.batch_tokens is not None:
        by_tokens = TokenBatchOrder(
            rows.lengths_by_group(),
            config.seed,
            budget=config.batch_tokens,
            sequences=(2 if config.needs_pairs else 1) * config.samples_a_row,
            micro_batches_per_step=micro_batches,
            shards_per_row=2 if config.round is not None and (config.needs_pairs or config.mix is not None) else 1,
            shares=shares,
        )
        return by_tokens, config.steps or by_tokens.num_steps(config.epochs or 1)
    else:
        order = BatchOrder(rows.group_sizes, config.seed, global_batch, config.batch_size, shares)
    if global_batch > order.num_rows:
        raise UserError(
            "a step takes more rows than there are",
            found=f"{global_batch} rows a step",
            expected=f"at most {order.num_rows}" + (f" without the {held_out} held-out examples" if held_out else ""),
            advice="Lower --batch-size",
        )
    return order, config.steps or math.ceil((config.epochs or 1) * order.num_rows / global_batch)
