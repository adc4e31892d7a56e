"""What a run keeps as it goes: validation and the best student so far, checkpoints, the model card."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from dpkd.core.progress import say
from dpkd.distill.objectives.objective import Objective
from dpkd.distill.run.best import BEST_DIR, Best, EvaluateFn, held_out_prompts
from dpkd.distill.run.checkpoints import StudentFiles, gather_optimizer, gather_weights, save_checkpoint, save_student
from dpkd.distill.run.logs import METRICS_LOG, last_line, shown
from dpkd.distill.run.model_card import model_card
from dpkd.distill.run.ranks import on_rank_zero
from dpkd.distill.run.setup import Run
from dpkd.distill.run.trackers import track
from dpkd.distill.run.validation import VALIDATION_LOG, Validation


class Keeper:
    """Measures and writes the student as it stands; every rank calls each method, the main one writes."""

    def __init__(
        self,
        run: Run,
        accelerator: Accelerator,
        student: StudentFiles,
        scorer: torch.nn.Module,
        optimizer: Any,
        objective: Objective,
        evaluate_fn: EvaluateFn | None,
    ) -> None:
        self._run, self._config, self._accelerator = run, run.config, accelerator
        self._student, self._scorer, self._optimizer = student, scorer, optimizer
        self._evaluate_fn = evaluate_fn
        self._saved: int | None = None
        self._best = None if run.config.best_metric is None else Best(run.config.best_metric)
        self._validation: Validation | None = None
        if run.validation is not None:
            self._validation = Validation(
                run.validation, objective, accelerator, run.config.batch_size, distributions=run.has_distributions
            )

    def put_back(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint says beside weights and optimiser."""
        if self._best is not None and state["best"] is not None:
            self._best = Best(**state["best"])

    def end_of_patience(self) -> str | None:
        """Why training ends here: no validation was better for long enough; None while it goes on."""
        if self._best is None or not self._best.is_over(self._config.patience):
            return None
        return f"no better {self._best.metric} since step {self._best.step}: training ends"

    def validate(self, done: int, *, last: bool) -> None:
        """Where a validation is due after `done` steps: measure, write the line, keep the student if it is the best."""
        if self._validation is None or not (last or done % self._config.validate_every == 0):
            return
        line = {"step": done, **self._validation(self._scorer)}
        if self._config.best_metric == "rouge_l":
            line["rouge_l"] = self._rouge_l(done)
        if self._accelerator.is_main_process:
            with (self._config.out / VALIDATION_LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            track(self._accelerator, line, "validation")
            say(f"step {done}: " + ", ".join(shown(line)))
        # the same numbers on every rank, and so the same answer
        if self._best is not None and self._best.note(line):
            self._write_student(self._config.out / BEST_DIR, done, self.card(done))

    def _rouge_l(self, done: int) -> float:
        """Rouge-L of the student's answers to the held-out prompts, by the function that was handed in."""
        assert self._evaluate_fn is not None
        assert self._run.validation is not None
        evaluate_fn, prompts = self._evaluate_fn, held_out_prompts(self._run.validation, self._run.student)
        directory = self._config.out / ".candidate"
        self._write_student(directory, done, None)
        score = on_rank_zero(self._accelerator, lambda: evaluate_fn(directory, prompts))
        on_rank_zero(self._accelerator, lambda: shutil.rmtree(directory))
        return float(score)

    def _write_student(self, directory: Path, step: int, card: str | None) -> None:
        weights = gather_weights(self._accelerator, self._scorer, self._student.model)
        facts = self._run.facts | {"steps": step}
        on_rank_zero(self._accelerator, lambda: save_student(directory, self._student, weights, facts, card))

    def card(self, step: int) -> str:
        """The model card of the student as it stands, of the lines that are written; empty off the main rank."""
        if not self._accelerator.is_main_process:
            return ""
        return model_card(
            self._run, step, *(last_line(self._config.out / name) for name in (METRICS_LOG, VALIDATION_LOG))
        )

    def save(self, step: int) -> None:
        """Write a checkpoint of `step`, once."""
        accelerator, run = self._accelerator, self._run
        if step == self._saved or accelerator.distributed_type == DistributedType.DEEPSPEED:
            return
        self._saved = step
        weights = gather_weights(accelerator, self._scorer, self._student.model)
        moments = gather_optimizer(self._student.model, self._optimizer.optimizer)
        facts, keep = run.facts | {"steps": step}, self._config.keep_checkpoints
        state = {"best": None if self._best is None else asdict(self._best)}
        on_rank_zero(
            accelerator,
            lambda: save_checkpoint(self._config.out, step, self._student, weights, moments, facts, keep, state),
        )
