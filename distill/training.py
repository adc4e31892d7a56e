"""`dpkd train`: Algorithm 1 of the paper (arXiv 2406.19774v2), against the cached teacher."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from accelerate import Accelerator

from dpkd.core.devices import explained_out_of_memory
from dpkd.core.errors import UserError
from dpkd.core.identity import derive_seed
from dpkd.core.progress import say
from dpkd.distill.batches.batch import MicroBatch
from dpkd.distill.objectives.objective import MEASURE_EVERY, Objective, StepSums
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.caches import verify_share
from dpkd.distill.run.best import EvaluateFn
from dpkd.distill.run.checkpointer import Checkpointer
from dpkd.distill.run.checkpoints import latest_checkpoint
from dpkd.distill.run.interrupts import Interrupts
from dpkd.distill.run.loader import StepLoader
from dpkd.distill.run.logs import RunLog
from dpkd.distill.run.ranks import (
    all_reduce_sums,
    ends_process_group,
    on_all_ranks,
    on_rank_zero,
    open_accelerator,
    raise_first,
    step_means,
)
from dpkd.distill.run.setup import Run, claim_directory, open_run
from dpkd.distill.run.student_state import load_student
from dpkd.distill.run.validation import Validator


@ends_process_group
def train(config: TrainConfig, evaluate_fn: EvaluateFn | None = None) -> Path:
    """Train as `config` says, or resume from the last checkpoint; the run directory, with the student at its root.

    `evaluate_fn` replaces the scoring of `dpkd eval` for the best_metric rouge_l. Raises `UserError` for what cannot be
    used (before anything is written), and when the loss is NaN or infinite.
    """
    accelerator = open_accelerator(config)
    on_all_ranks(accelerator, lambda: verify_share(config, accelerator.process_index, accelerator.num_processes))
    run = on_all_ranks(accelerator, lambda: open_run(config, accelerator.num_processes))
    with claim_directory(run, accelerator) as is_complete:
        if not is_complete:
            with out_of_memory(config):
                return _train(run, accelerator, evaluate_fn)
        on_rank_zero(accelerator, lambda: say(f"the run {config.out} is complete"))
        return config.out


def _train(run: Run, accelerator: Accelerator, evaluate_fn: EvaluateFn | None) -> Path:
    config = run.config
    checkpoint = on_rank_zero(accelerator, lambda: latest_checkpoint(config.out, config.resume_from))
    student = load_student(run, accelerator, checkpoint)
    objective = Objective(config, run.vocab_size, run.student.vocab_size)
    checkpointer = Checkpointer(run, accelerator, student, checkpoint)
    validator = Validator(run, accelerator, student, objective, checkpointer, evaluate_fn)
    done = checkpointer.first
    with (
        RunLog(run, accelerator, done) as log,
        Interrupts(quiet=not accelerator.is_main_process) as interrupts,
        StepLoader(run, accelerator, student.model, done, interrupts) as loader,
    ):
        if done == 0:
            validator.validate_if_due(0)
        student.scorer.train()
        while done < run.steps and not validator.should_stop():
            log.start_step()
            micro_batches = loader.next(done)
            if micro_batches is None:  # interrupted, or the rows ended: keep what was learned
                checkpointer.save(done, loader)
                loader.raise_reason()
            # everything random in a step follows from the seed and the step, so a resumed run needs no generator state
            torch.manual_seed(derive_seed(config.seed, done, accelerator.process_index))
            counts = all_reduce_sums(accelerator, [objective.counts(micro_batch) for micro_batch in micro_batches])
            measure, sums = done % MEASURE_EVERY == 0, list[StepSums]()
            losses: list[torch.Tensor] = []
            for micro_batch in micro_batches:
                with accelerator.accumulate(student.scorer):
                    sums.append(objective(student.scorer, micro_batch.to(accelerator.device), measure=measure))
                    loss = objective.total(sums[-1], counts)
                    losses.append(loss.detach())
                    # accelerate averages over micro-batches and ranks; the counts divide by the whole step already
                    accelerator.backward(loss * config.gradient_accumulation_steps * accelerator.num_processes)
            means, grad_norm = step_means(accelerator, sums, counts, objective.weights), student.clip_gradients()
            raise_first(accelerator, find_non_finite(sum(losses), grad_norm, done + 1, micro_batches, config.out))
            learning_rate = student.update()
            tokens = all_reduce_sums(accelerator, [{"tokens": part.num_positions} for part in micro_batches])
            line = {"step": done + 1, **run.epochs(done), **means, "learning_rate": learning_rate}
            log.log_step(line | {"grad_norm": grad_norm, **tokens}, loader.wait_s)
            done += 1
            validator.validate_if_due(done, micro_batches)
            if checkpointer.is_due(done):
                checkpointer.save(done, loader)
        if done == run.steps and loader.sync_followed_shards():
            checkpointer.save(done, loader)
            loader.wait_for_end_of_cache()
    return checkpointer.finish(done)


def out_of_memory(config: TrainConfig) -> AbstractContextManager[None]:
    """Inside, running out of memory is a `UserError` that says what makes a step smaller."""
    size = f"{config.batch_size} rows" if config.batch_tokens is None else f"{config.batch_tokens} tokens"
    smaller = "Halve --batch-size and double --gradient-accumulation-steps, or give --gradient-checkpointing"
    if config.batch_tokens is not None:
        smaller = "Give --gradient-checkpointing, or a lower --batch-tokens and another --out"
    return explained_out_of_memory(
        "training ran out of memory", found=f"micro-batches of {size}", advice=f"{smaller}; the last checkpoint is kept"
    )


def find_non_finite(
    loss: float | torch.Tensor, grad_norm: float | None, step: int, micro_batches: list[MicroBatch], out: Path
) -> UserError | None:
    """The error for a rank's loss or a gradient norm that is NaN or infinite; None if both are finite."""
    for name, value in (("loss", float(loss)), ("gradient norm", grad_norm)):
        if value is not None and not math.isfinite(value):
            rows = [row for part in micro_batches for row in dict.fromkeys(part.rows.example_ids)]
            return UserError(
                f"the {name} is {value} at step {step}; stopped before the update",
                where=f"rows {', '.join(rows[:8])}{' …' if len(rows) > 8 else ''} of {out}",
                advice="Lower --learning-rate, or look at these rows; the last checkpoint is kept",
            )
    return None
