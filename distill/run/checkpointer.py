"""When a run writes its student: checkpoints to resume from, the best student, the result at the end."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType

from dpkd.core.progress import say
from dpkd.distill.run.alarms import ALARMS_LOG, Alarms
from dpkd.distill.run.best import BEST_DIR, Best, take_best
from dpkd.distill.run.checkpoints import Checkpoint, finish_run, save_checkpoint, save_student
from dpkd.distill.run.loader import StepLoader
from dpkd.distill.run.logs import METRICS_LOG, VALIDATION_LOG, last_line, progress_to_teacher, sync_logs
from dpkd.distill.run.model_card import model_card
from dpkd.distill.run.ranks import on_rank_zero
from dpkd.distill.run.setup import Run
from dpkd.distill.run.student_state import StudentState


class Checkpointer:
    """Writes the student as it is now; every rank calls each method, rank zero writes.

    `best` (None: the last student is the run's result) and `alarms` are what the validations have found. They go into
    checkpoints, and start as the last one had them.
    """

    def __init__(
        self, run: Run, accelerator: Accelerator, student: StudentState, checkpoint: Checkpoint | None
    ) -> None:
        self._run, self._accelerator, self._student = run, accelerator, student
        self.first = self._saved = 0 if checkpoint is None else checkpoint.step
        state = {} if checkpoint is None else checkpoint.state
        metric = run.validation.best_metric
        self.best = None if metric is None else Best(**(state.get("best") or {"metric": metric}))
        self.alarms = Alarms(**(state.get("alarms") or {}))

    @property
    def stops_by_alarm(self) -> bool:
        """Whether an alarm that was given ends the run."""
        return self._run.config.on_alarm == "stop" and bool(self.alarms.names)

    def is_due(self, done: int) -> bool:
        """Whether `save_every` asks for a checkpoint after `done` steps; the end of the run needs none."""
        every = self._run.config.save_every
        return every is not None and done % every == 0 and done < self._run.steps

    def save(self, done: int, loader: StepLoader) -> None:
        """Write the checkpoint of `done` steps, once; none with DeepSpeed, which keeps the optimizer's state itself."""
        if done == self._saved or self._accelerator.distributed_type == DistributedType.DEEPSPEED:
            return
        loader.settle()
        self._saved = done
        config, files, facts = self._run.config, self._student.files, self._run.facts | {"steps": done}
        state = {"best": self.best and asdict(self.best), "alarms": asdict(self.alarms)}
        arguments = (files, self._student.weights(), self._student.moments(), facts, state)
        directory = config.out / f"checkpoint-{done}"

        def save() -> None:
            sync_logs(config.out)  # a resumed run keeps their lines up to this step
            save_checkpoint(directory, *arguments, keep=config.keep_checkpoints)

        on_rank_zero(self._accelerator, save)

    def save_student(self, directory: Path, done: int, *, with_card: bool = True) -> None:
        """Replace `directory` by the student after `done` steps, ready for use."""
        weights, facts = self._student.weights(), self._run.facts | {"steps": done}
        card = self._card(done) if with_card else None
        on_rank_zero(self._accelerator, lambda: save_student(directory, self._student.files, weights, facts, card))

    def finish(self, done: int) -> Path:
        """Write the run's student to its directory, the best one if one was kept, and mark the run complete."""
        out, final = self._run.config.out, self._run.config.out / ".final"
        best_step = None if self.best is None or self.best.value is None else self.best.step
        step = on_rank_zero(self._accelerator, lambda: take_best(out / BEST_DIR, final, best_step))
        if step is None:
            step = done
            self.save_student(final, done)
        names = self.alarms.names
        facts = self._run.facts | {"steps": done, "student_step": step, "alarms": names}
        facts["stopped_by_alarm"] = self.stops_by_alarm
        on_rank_zero(self._accelerator, lambda: sync_logs(out))
        on_rank_zero(self._accelerator, lambda: finish_run(out, final, facts))
        for tracker in self._accelerator.trackers:
            tracker.finish()
        if self._accelerator.is_main_process:
            for text in progress_to_teacher(out / VALIDATION_LOG, step, self._run.validation.best_metric):
                say(text)
            alarms = f", {len(names)} alarm{'s' if len(names) > 1 else ''} ({out / ALARMS_LOG})" if names else ""
            say(f"the run {out} is complete: {done} steps{alarms}")
        return out

    def _card(self, done: int) -> str:
        """The model card from the lines written so far; empty on other ranks."""
        if not self._accelerator.is_main_process:
            return ""
        lines = (last_line(self._run.config.out / name) for name in (METRICS_LOG, VALIDATION_LOG))
        return model_card(self._run, done, *lines)
