"""Validation on held-out rows of the cache, with its teacher distributions; the best student; early stopping."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import torch
from accelerate import Accelerator

from dpkd.core.bridges import load_bridge
from dpkd.core.progress import say
from dpkd.distill.batches.batch import MicroBatch
from dpkd.distill.batches.collate import collate
from dpkd.distill.objectives.objective import Objective, StepSums
from dpkd.distill.rows.row import RowSource
from dpkd.distill.run.best import BEST_DIR, Best, EvaluateFn, held_out_prompts
from dpkd.distill.run.checkpointer import Checkpointer
from dpkd.distill.run.logs import VALIDATION_LOG
from dpkd.distill.run.ranks import all_reduce_sums, on_rank_zero, step_means
from dpkd.distill.run.setup import Run
from dpkd.distill.run.student_state import StudentState
from dpkd.distill.run.trackers import track

_SHOWN = ("loss", "kld", "rkld", "reward_margin", "rouge_l")


class Validator:
    """Validates when due, keeps the best student, and says when to stop early; every rank calls each method.

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
            self._evaluate_fn = load_bridge("rouge_l")(run.config)
        metric = run.validation.best_metric
        self._best = None if metric is None else Best(**(checkpointer.best or {"metric": metric}))

    def validate_if_due(self, done: int) -> None:
        """Validate before the first step, as often as planned and after the last one."""
        if not self._run.validation.is_due(done, self._run.steps):
            return
        line = {"step": done, **validate(self._accelerator, self._objective, self._student.scorer, self._run)}
        if self._config.best_metric == "rouge_l":
            line["rouge_l"] = self._rouge_l(done)
        if self._accelerator.is_main_process:
            with (self._config.out / VALIDATION_LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            track(self._accelerator, line, "validation")
            shown = [name for name in _SHOWN if line.get(name) is not None]
            say(f"step {done}: " + ", ".join(f"validation {name} {line[name]:.4f}" for name in shown))
        if self._best is None:
            return
        if done == 0:  # where training starts is no result of it, but a metric that is missing is missing here already
            self._best.value_of(line)
        elif self._best.note(line):  # the metrics are the same on every rank, so all ranks agree on what is best
            self._checkpointer.save_student(self._config.out / BEST_DIR, done)
        self._checkpointer.best = asdict(self._best)

    def should_stop(self) -> bool:
        """Whether `patience` validations in a row were no better than the best."""
        if self._best is None or not self._best.is_over(self._config.patience):
            return False
        if self._accelerator.is_main_process:
            say(f"early stopping: {self._best.metric} has not improved since step {self._best.step}")
        return True

    def _rouge_l(self, done: int) -> float:
        assert self._evaluate_fn is not None
        assert self._run.validation.rows is not None
        evaluate_fn, prompts = self._evaluate_fn, held_out_prompts(self._run.validation.rows, self._run.student)
        directory = self._config.out / ".candidate"
        self._checkpointer.save_student(directory, done, with_card=False)
        score = on_rank_zero(self._accelerator, lambda: evaluate_fn(directory, prompts))
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
    indices = [(group, index) for group, size in enumerate(rows.group_sizes) for index in range(size)]
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
        micro_batch = MicroBatch(collate(found, with_distributions=run.cache is not None and run.cache.top_k > 0))
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
