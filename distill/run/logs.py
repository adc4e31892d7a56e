"""What a run logs: a JSON line a step and a validation, the tracker, the progress that a person sees."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator

from dpkd.core.files import sync, write_atomic
from dpkd.core.json_lines import complete_lines, loads
from dpkd.core.progress import Progress, say
from dpkd.distill.run.alarms import ALARMS_LOG
from dpkd.distill.run.ranks import on_all_ranks
from dpkd.distill.run.setup import Run
from dpkd.distill.run.trackers import start_tracker, track

METRICS_LOG = "metrics.jsonl"
VALIDATION_LOG = "validation.jsonl"
_LOGS = (METRICS_LOG, VALIDATION_LOG, ALARMS_LOG)
_SPIKE_FACTOR = 10.0
_SPIKE_WINDOW, _SPIKE_LEAST = 100, 20  # steps


class RunLog:
    """Logs steps from `first` on: `metrics.jsonl` and progress on rank zero, the tracker on all ranks.

    Opening it drops the lines of steps that a resumed run takes again.
    """

    def __init__(self, run: Run, accelerator: Accelerator, first: int) -> None:
        self._run, self._accelerator, self._first = run, accelerator, first
        self._spikes = NormSpikes()
        self._stack = contextlib.ExitStack()
        self._started_s = time.perf_counter()

    def __enter__(self) -> Self:
        config = self._run.config
        on_all_ranks(self._accelerator, lambda: start_tracker(self._accelerator, config, self._first))
        if self._accelerator.is_main_process:
            validated = [step for step in range(self._first + 1) if self._run.validation.is_due(step, self._run.steps)]
            for name, steps in zip(_LOGS, (range(1, self._first + 1), validated, ()), strict=True):
                keep_lines(config.out / name, self._first, steps)
            self._file = self._stack.enter_context((config.out / METRICS_LOG).open("a", encoding="utf-8"))
            self._progress = self._stack.enter_context(Progress("train", self._run.steps, "steps", self._first))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def start_step(self) -> None:
        """Start the clock of a step."""
        self._started_s = time.perf_counter()

    def log_step(self, line: dict[str, Any], wait_s: float) -> None:
        """Log the metrics of the step that ends now; `wait_s` of its time was spent waiting for rows."""
        step_s = time.perf_counter() - self._started_s
        line |= {"tokens_per_s": line["tokens"] / step_s, "step_time_s": step_s, "data_wait_s": wait_s}
        line["peak_memory_bytes"] = peak_memory_bytes(self._accelerator.device)
        track(self._accelerator, line, "train")
        if not self._accelerator.is_main_process:
            return
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if spike := self._spikes.note(line["grad_norm"]):
            say(f"step {line['step']}: {spike}")
        fields = {"loss": f"{line['loss']:.4f}"}
        if line.get("reward_margin") is not None:
            fields["margin"] = f"{line['reward_margin']:.3f}"
        fields["tokens_per_s"] = f"{line['tokens_per_s']:.0f}"
        fields["memory"] = f"{line['peak_memory_bytes'] / 1e9:.2f} GB"
        self._progress.advance(1, **fields)


class NormSpikes:
    """Finds gradient norms of more than ten times the median of the last hundred."""

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=_SPIKE_WINDOW)

    def note(self, norm: float | None) -> str | None:
        """Record the norm of a step before clipping; a sentence about it if it is a spike."""
        if norm is None:
            return None
        text = None
        if len(self._norms) >= _SPIKE_LEAST:
            median = statistics.median(self._norms)
            if norm > _SPIKE_FACTOR * median:
                text = f"gradient norm {norm:.3g}, {norm / median:.0f} times the median of {len(self._norms)} steps"
        self._norms.append(norm)
        return text


def progress_to_teacher(path: Path, step: int, metric: str | None) -> list[str]:
    """What the validations of a run say at its end: the student of `step`, which is best by `metric`, and the start.

    `metric` is None where the last student is the result. A second sentence warns of a student that is further from the
    teacher than before training.
    """
    lines = {line["step"]: line for line in map(json.loads, complete_lines(path)) if line.get("kld") is not None}
    if 0 not in lines or step not in lines or not step:
        return []
    first, result = lines[0], lines[step]
    agreement = " -> ".join(f"{line['top1_agreement']:.0%}" for line in (first, result))
    which = f"best{'' if metric == 'kld' else f' {metric}'} at step {step}" if metric else f"last step {step}"
    of_caches = [key for key in result if key.startswith("kld/") and result[key] is not None]
    each = ", ".join(f"{key.partition('/')[2]} {first[key]:.2f} -> {result[key]:.2f}" for key in of_caches)
    moved = f"{first['kld']:.2f} -> {result['kld']:.2f}"
    moved = f"teachers {moved} ({each})" if each else f"teacher {moved}"
    said = [f"KL to the {moved}, top-1 agreement {agreement}, {which}"]
    best = min(lines.values(), key=lambda line: line["kld"])
    if metric != "kld" and best["kld"] < result["kld"]:
        said.append(f"the best KL was {best['kld']:.2f} at step {best['step']}: --best-metric kld keeps that student")
    if result["kld"] > first["kld"]:
        said.append(
            "warning: the student is further from the teacher than before training. Lower --learning-rate, or see "
            "'Where each objective ends' in docs/objectives.md"
        )
    return said


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process so far, in bytes: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # on Linux ru_maxrss includes the parent process if that was larger; VmHWM does not
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def last_line(path: Path) -> dict[str, Any] | None:
    """The last line of a log; None where there is none."""
    lines = complete_lines(path)
    return json.loads(lines[-1]) if lines else None


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line to a log that is written rarely."""
    with path.open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def sync_logs(out: Path) -> None:
    """Wait until all lines so far are on the disk; `UserError` when it refuses."""
    sync(*(out / name for name in _LOGS if (out / name).is_file()), out)


def keep_lines(path: Path, step: int, expected: Collection[int] = ()) -> None:
    """Drop the lines after `step`, which a resumed run writes again; a new run (step 0) starts an empty log.

    Lines that cannot be read, as a power loss leaves them, are dropped too. A warning counts them, and those of the
    `expected` steps that have no line.
    """
    lines = [(_step_of(line), line) for line in complete_lines(path)]
    kept = [(number, line) for number, line in lines if number is not None and number <= step and step > 0]
    if path.is_file():
        write_atomic(path, b"".join(line for _, line in kept))
    unreadable = sum(number is None for number, _ in lines)
    there = {number for number, _ in kept}
    missing = [number for number in expected if number not in there]
    texts = [f"unreadable lines, dropped: {unreadable}"] if unreadable else []
    if missing:
        texts.append(f"missing lines up to step {step}: {len(missing)} of {len(expected)}, from step {missing[0]} on")
    if texts and step > 0:
        say(f"warning: {path} is damaged ({'; '.join(texts)}). The student is not affected")


def _step_of(line: bytes) -> int | None:
    """The step of a line of a log; None if the line cannot be read."""
    try:
        step = loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
