"""Validation on held-out rows of the cache: the best student, alarms, early stopping."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property

import torch
from accelerate import Accelerator

from dpkd.core.bridges import load_bridge
from dpkd.core.progress import say
from dpkd.distill.batches.batch import MicroBatch, cut_entries
from dpkd.distill.batches.collate import collate
from dpkd.distill.objectives.gradient_share import gradient_norms, preference_share
from dpkd.distill.objectives.objective import Objective, StepSums
from dpkd.distill.rows.row import RowSource, indices_of
from dpkd.distill.run.alarms import ALARMS_LOG, Watch
from dpkd.distill.run.best import BEST_DIR, EvaluateFn, HeldOutPrompt, held_out_prompts
from dpkd.distill.run.checkpointer import Checkpointer
from dpkd.distill.run.logs import VALIDATION_LOG, append_line
from dpkd.distill.run.ranks import all_reduce_sums, is_sharded, on_rank_zero, step_means
from dpkd.distill.run.setup import Run
from dpkd.distill.run.student_state import StudentState
from dpkd.distill.run.trackers import track

_SHOWN = ("loss", "kld", "rkld", "reward_margin", "rouge_l")


class Validator:
    """Validates when due, keeps the best student, gives alarms, and says when to stop; every rank calls each method.

    `evaluate_fn` measures the best_metric `rouge_l`; None is the scoring of `dpkd eval`.
    """

    def __init__(
        self,
        run: Run,
        accelerator: Accelerator,
        student: StudentState,
        objective: Objective,
        checkpointer: Checkpointer,
        evaluate_fn: EvaluateFn | None = None,
    ) -> None:
        self._run, self._config, self._accelerator = run, run.config, accelerator
        self._student, self._objective, self._checkpointer = student, objective, checkpointer
        self._evaluate_fn = evaluate_fn
        if run.validation.best_metric == "rouge_l" and evaluate_fn is None:
            self._evaluate_fn = load_bridge("rouge_l")(run.config, run.max_new_tokens)
        self._is_sharded = is_sharded(accelerator)
        self._watch = Watch()
        if run.validation.rows is not None:
            self._watch = Watch.of(run.config, run.validation.rows, run.vocab_size)

    def validate_if_due(self, done: int, micro_batches: Sequence[MicroBatch] = ()) -> None:
        """Validate before the first step, as often as planned and after the last one.

        `micro_batches` are those of the step before, on the first of which the terms' shares of the gradient are
        measured.
        """
        if not self._run.validation.is_due(done, self._run.steps):
            return
        line = {"step": done, **validate(self._accelerator, self._objective, self._student.scorer, self._run)}
        if micro_batches and (share := self._preference_share(micro_batches[0])) is not None:
            line["preference_share"] = share
        if self._run.validation.best_metric == "rouge_l":
            line["rouge_l"] = self._rouge_l(done)
        if self._accelerator.is_main_process:
            append_line(self._config.out / VALIDATION_LOG, line)
            track(self._accelerator, line, "validation")
            names = [*_SHOWN, *(name for name in line if name.startswith("kld/"))]
            shown = [name for name in names if line.get(name) is not None]
            say(f"step {done}: " + ", ".join(f"validation {name} {line[name]:.4f}" for name in shown))
        # the metrics are the same on every rank, so all ranks agree on what is best and on alarms
        for alarm in self._checkpointer.alarms.note(line, self._watch):
            if self._accelerator.is_main_process:
                append_line(self._config.out / ALARMS_LOG, {"step": done, **asdict(alarm)})
                say(f"alarm at step {done}: {alarm.text}")
        if (best := self._checkpointer.best) is None:
            return
        if done == 0:  # where training starts is no result of it, but a metric that is missing is missing here already
            best.value_of(line)
        elif best.note(line):
            self._checkpointer.save_student(self._config.out / BEST_DIR, done)

    def should_stop(self) -> bool:
        """Whether `patience` validations in a row were no better than the best, or an alarm is to stop the run."""
        reason, best, patience = None, self._checkpointer.best, self._config.patience
        if self._checkpointer.stops_by_alarm:
            reason = f"stopped by an alarm, {self._checkpointer.alarms.names[0]}, as --on-alarm stop asks"
        elif best is not None and patience is not None and best.num_since >= patience:
            reason = f"early stopping: {best.metric} has not improved since step {best.step}"
        if reason is not None and self._accelerator.is_main_process:
            say(reason)
        return reason is not None

    def _preference_share(self, micro_batch: MicroBatch) -> float | None:
        """The preference's share of the gradient, measured on rank zero; None where there is no other term.

        Sharded weights exist only while the whole model runs, so there it is not measured.
        """
        weights = self._objective.weights
        if "dpkd" not in weights or len(weights) == 1 or self._is_sharded:
            return None
        scorer = self._accelerator.unwrap_model(self._student.scorer)
        scorer.eval()
        part = micro_batch.to(self._accelerator.device)
        share = on_rank_zero(self._accelerator, lambda: preference_share(gradient_norms(self._objective, scorer, part)))
        scorer.train()
        return share

    @cached_property
    def _prompts(self) -> list[HeldOutPrompt]:
        plan = self._run.validation
        assert plan.rows is not None
        return held_out_prompts(plan.rows, plan.references, self._run.student)

    def _rouge_l(self, done: int) -> float:
        assert self._evaluate_fn is not None
        evaluate_fn, directory = self._evaluate_fn, self._config.out / ".candidate"
        self._checkpointer.save_student(directory, done, with_card=False)
        score = on_rank_zero(self._accelerator, lambda: evaluate_fn(directory, self._prompts))
        on_rank_zero(self._accelerator, lambda: shutil.rmtree(directory))
        return float(score)


@torch.no_grad()
def validate(
    accelerator: Accelerator, objective: Objective, scorer: torch.nn.Module, run: Run
) -> dict[str, float | None]:
    """Means of the objective's terms and metrics over all validation rows of `run`, in eval mode.

    A term that the rows lack is left out, and `loss` is then None: held-out rows have no student's response where those
    are sampled live, and no text of the corpus. Random choices (a drawn token) are the same at every call.
    """
    assert run.validation.rows is not None
    rows: RowSource = run.validation.rows
    indices = [*indices_of(rows)]
    size, ranks, rank = run.config.batch_size, accelerator.num_processes, accelerator.process_index
    batches = [indices[start : start + size] for start in range(0, len(indices), size)]
    state = torch.get_rng_state()
    scorer.eval()
    counts: list[dict[str, int]] = []
    sums: list[StepSums] = []
    for start in range(0, len(batches), ranks):
        # every rank takes part in every turn: one without a batch of its own takes the last, with weight 0
        number = min(start + rank, len(batches) - 1)
        torch.manual_seed(number)
        found = [rows.row(*index) for index in batches[number]]
        both = run.config.contrasts and all(row.rejected is not None for row in found)
        whole = collate(found, with_distributions=run.keeps_distributions, of_rejected=both)
        micro_batch = MicroBatch(cut_entries(whole, run.config.top_k, run.config.top_mass))
        batch_sums = objective(scorer, micro_batch.to(accelerator.device))
        batch_counts = objective.counts(micro_batch)
        if number != start + rank:
            batch_sums.terms = {name: value * 0 for name, value in batch_sums.terms.items()}
            batch_sums.metrics = {name: (value * 0, 0) for name, (value, _) in batch_sums.metrics.items()}
            batch_counts = dict.fromkeys(batch_counts, 0)
        counts.append(batch_counts)
        sums.append(batch_sums)
    scorer.train()
    torch.set_rng_state(state)
    return step_means(accelerator, sums, all_reduce_sums(accelerator, counts), objective.weights)
