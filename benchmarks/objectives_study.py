"""Which objective distils best: every arm of `recipes/study`, measured in the same way.

    python benchmarks/objectives_study.py --teacher DIR --data dolly_train.jsonl --select dolly_dev.jsonl \\
        --eval dolly=dolly_eval.jsonl --out DIR --jobs 8 --time-limit 550

The protocol is in docs/results/objectives.md. Each arm trains at every rate of `--rates` with the first seed; the rate
with the lowest KL(teacher || student) on the selection rows is kept and its student answers the evaluation rows. Then
the finalists, and the arms of study/cache-size, train with all seeds. Every result is a line of OUT/results.jsonl.

You can stop the study at any moment and start it again: it repeats only the runs that were not finished. A run that
fails is a line with `error`, and is tried again at the next start. `--time-limit` ends it in time, with a summary.
`study_page.py` makes the page of the results.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, cast

from study_arms import ARM_RECIPES, SIZE_RECIPE, Study
from study_page import FACTS, choose_finalists, summary
from study_runs import START, cache_sizes, drop_run, measure_run, prepare

_GRACE_S = 15  # for workers to end
#: options that the page shows
_FACTS = (
    *("rows", "select_rows", "eval_rows", "max_new_tokens", "steps", "rates", "writer_rates", "seeds", "eval_seeds"),
    *("jobs", "device", "engine"),
)


class Task(NamedTuple):
    """One run; with `scored`, its answers are measured too."""

    arm: str
    rate: float
    seed: int
    scored: bool


class Results:
    """The lines of OUT/results.jsonl, and what is left to do."""

    def __init__(self, study: Study, options: argparse.Namespace) -> None:
        self.path = study.out / "results.jsonl"
        lines = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.is_file() else []
        self.lines: list[dict[str, Any]] = [line for line in lines if "error" not in line]
        self.failed: set[Task] = set()
        self._study, self._options = study, options
        recipes = study.arms(1.0, 0)
        self.arms = [name for name in recipes if options.arms is None or name in options.arms]
        #: arms that need no student's responses
        self.early = {*study.arms(1.0, 0, ["token"])}
        self.sizes = [*study.arms(1.0, 0, [SIZE_RECIPE])] if "sizes" in options.parts else []

    def add(self, task: Task, result: dict[str, Any]) -> None:
        """Append the result of `task`."""
        line = task._asdict() | result
        with self.path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        if "error" in line:
            self.failed.add(task)
        else:
            self.lines.append(line)
        shown = {key: round(v, 3) if isinstance(v, float) else v for key, v in line.items() if "rows" not in key}
        print(json.dumps(shown), flush=True)

    def find(self, arm: str, seed: int, *, scored: bool) -> list[dict[str, Any]]:
        """The finished runs of an arm."""
        return [line for line in self.lines if (line["arm"], line["seed"], line["scored"]) == (arm, seed, scored)]

    def rates(self, arm: str) -> tuple[float, ...]:
        """The learning rates to try."""
        on_writer = arm.startswith(("eq", "writer"))
        return self._options.writer_rates if on_writer else self._options.rates

    def best_rate(self, arm: str) -> float | None:
        """The rate with the lowest KL on the selection rows; None while some have not been tried."""
        first = self._options.seeds[0]
        if len(self.rates(arm)) == 1:
            return self.rates(arm)[0]
        found = {line["rate"]: line["kl"] for line in self.find(arm, first, scored=False)}
        tried = set(found) | {task.rate for task in self.failed if task[:1] == (arm,) and not task.scored}
        if not found or not tried >= set(self.rates(arm)):
            return None
        return min(found, key=lambda rate: found[rate])

    def next(self, running: set[Task]) -> Task | None:
        """What to start next; None if there is nothing, or nothing yet."""
        first, parts = self._options.seeds[0], self._options.parts
        done = {Task(*(line[key] for key in Task._fields)) for line in self.lines} | running | self.failed
        start = Task(START, 0.0, first, False)
        if not (self._study.out / "writer" / "model.safetensors").is_file():
            done -= {start} - running  # results from another machine, without what the arms share
        is_started = start in done and start not in running
        due = [] if set(self.arms) <= self.early else [start]
        arms = [arm for arm in self.arms if is_started or arm in self.early]
        scores = [(arm, rate) for arm in arms if (rate := self.best_rate(arm)) is not None]
        due += [Task(arm, rate, first, True) for arm, rate in scores]
        # of a single rate there is nothing to choose: its run is measured once, with its answers
        due += [Task(arm, rate, first, False) for arm in arms if len(rates := self.rates(arm)) > 1 for rate in rates]
        open_arms = [task for task in due if task not in done]
        settled = not open_arms and not running & set(due)
        later: list[Task] = []
        if settled and "finalists" in parts:
            names = choose_finalists(self.lines, first, self._options.finalists)
            rates = dict(scores)
            later += [Task(arm, rates[arm], seed, True) for seed in self._options.seeds[1:] for arm in names]
        default = dict(scores).get("dpkd-all")
        if default is not None:  # `dpkd-all` is the size of the default cache
            sizes = [*self.sizes, "dpkd-all"] if self.sizes else []
            later += [Task(arm, default, seed, True) for seed in self._options.seeds[:3] for arm in sizes]
        return next((task for task in [*open_arms, *later] if task not in done), None)

    def drop_losers(self) -> None:
        """Delete the weights of runs at rates that were not chosen."""
        for arm in self.arms:
            if (best := self.best_rate(arm)) is not None:
                for rate in set(self.rates(arm)) - {best}:
                    drop_run(self._study, arm, rate, self._options.seeds[0])


def serve(pipe: Connection, study: Study, number: int) -> None:
    """A worker: run tasks from `pipe` until it closes; what it prints goes to OUT/worker-N.log."""
    import torch

    log = (study.out / f"worker-{number}.log").open("a", encoding="utf-8")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torch.set_float32_matmul_precision("high")
    torch.set_num_threads(1)
    while True:
        try:
            task: Task = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(measure_run(study, task.arm, task.rate, task.seed, scored=task.scored))
        except Exception as error:  # one run that fails must not end the study: its line says why
            where = traceback.extract_tb(error.__traceback__)[-1]
            pipe.send({"error": f"{type(error).__name__}: {error}"[:300], "where": f"{where.filename}:{where.lineno}"})


class Workers:
    """Processes that import torch once and run one task at a time each; a dead one is replaced."""

    def __init__(self, study: Study, number: int) -> None:
        self._study, self._context = study, multiprocessing.get_context("spawn")
        self._free = number
        self._busy: dict[Any, tuple[Any, Task]] = {}  # by pipe
        self._idle: list[tuple[Any, Any]] = []

    @property
    def running(self) -> set[Task]:
        return {task for _, task in self._busy.values()}

    def work(self, results: Results, is_over: Callable[[], bool]) -> None:
        """Run tasks until there are none, or until `is_over`."""
        while not is_over():
            while (self._idle or self._free) and (task := results.next(self.running)) is not None:
                process, pipe = self._idle.pop() if self._idle else self._start()
                pipe.send(task)
                self._busy[pipe] = process, task
            if not self._busy:
                return
            for ready in wait(list(self._busy), timeout=1):
                pipe = cast(Any, ready)
                process, task = self._busy.pop(pipe)
                try:
                    results.add(task, pipe.recv())
                    self._idle.append((process, pipe))
                except (EOFError, ConnectionResetError):
                    process.join()
                    self._free += 1
                    results.add(task, {"error": f"the worker ended with exit code {process.exitcode}"})
                results.drop_losers()

    def _start(self) -> tuple[Any, Any]:
        self._free -= 1
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=serve, args=(theirs, self._study, self._free), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def close(self) -> None:
        """End all workers; a run in progress writes a checkpoint if there is time."""
        started = [process for process, _ in self._busy.values()] + [process for process, _ in self._idle]
        for _, pipe in self._idle:
            pipe.close()
        for process, _ in self._busy.values():
            process.terminate()
        deadline_s = time.monotonic() + _GRACE_S
        for process in started:
            process.join(max(deadline_s - time.monotonic(), 0.1))
            if process.is_alive():
                process.kill()


def main() -> None:
    options = parse()
    started_s = time.monotonic()
    study = Study(
        teacher=str(options.teacher), data=str(options.data), select=str(options.select), evals=dict(options.eval),
        out=options.out, rows=options.rows, select_rows=options.select_rows, eval_rows=options.eval_rows,
        steps=options.steps, tokens=options.max_new_tokens, eval_seeds=options.eval_seeds, recipes=options.recipes,
        device=options.device, engine=options.engine, max_num_seqs=options.max_num_seqs, student=options.student,
        url=options.teacher_url,
    )  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # several processes share a GPU
    seconds = prepare(study)
    workers, results = Workers(study, options.jobs), Results(study, options)
    if not results.find(FACTS, 0, scored=False):
        kept = {key: value for key, value in vars(options).items() if key in _FACTS}
        facts = {"options": kept | {"eval": list(study.evals)}, "seconds": seconds, "sizes": cache_sizes(study)}
        results.add(Task(FACTS, 0.0, 0, False), facts)
    print(f"prepared after {time.monotonic() - started_s:.0f} s", flush=True)

    def is_over() -> bool:
        limit_s = options.time_limit
        return limit_s is not None and time.monotonic() - started_s > limit_s - _GRACE_S

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the workers must not outlive the study
    try:
        workers.work(results, is_over)
    finally:
        left = workers.running
        workers.close()
    print(summary(options.out))
    print(f"stopped: {len(left)} runs were in progress; start it again to resume" if left else "the study is complete")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", type=Path, required=True, help="checkpoint of the teacher")
    add("--data", type=Path, required=True, help="training rows with references (JSON lines)")
    add("--select", type=Path, required=True, help="rows to choose learning rates and finalists on")
    add("--eval", type=_named, action="append", required=True, help="NAME=FILE: rows to evaluate on; repeatable")
    add("--out", type=Path, required=True, help="directory of the study; start with the same one to continue")
    add("--student", help="the start of every arm; none: 20 of 30 layers, as in study/start")
    add("--rows", type=int, default=1000, help="training rows to cache")
    add("--select-rows", type=int, default=64, help="selection rows")
    add("--eval-rows", type=int, default=250, help="rows of each evaluation set")
    add("--max-new-tokens", type=int, default=96, help="longest response and answer, in tokens")
    add("--steps", type=int, default=120, help="optimiser steps of a run, 8 rows each")
    add("--rates", type=_floats, default=(1e-4, 3e-4, 1e-3), help="learning rates, comma-separated")
    add("--writer-rates", type=_floats, default=(3e-5, 1e-4, 3e-4), help="those of arms that start from the writer")
    add("--seeds", type=_ints, default=(0, 1, 2, 3, 4), help="training seeds, comma-separated")
    add("--eval-seeds", type=_ints, default=(10, 20), help="seeds of the answers, comma-separated")
    add("--recipes", type=_texts, default=ARM_RECIPES, help="recipes of study/ with arms, in the order to run them")
    add("--teacher-url", default="http://127.0.0.1:8000", help="with the recipe live: server of the cache's teacher")
    add("--arms", type=_texts, help="only these arms, comma-separated")
    add("--finalists", type=int, default=6, help="how many of the best arms train with every seed")
    add("--parts", type=_texts, default=("finalists", "sizes"), help="what to run after the arms' first seed")
    add("--jobs", type=int, default=1, help="runs at once; on a GPU each takes about 8 GB")
    add("--time-limit", type=float, help="end after so many seconds")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--engine", default="transformers", help="engine that draws and scores responses")
    add("--max-num-seqs", type=int, default=256, help="responses to draw at once")
    return parser.parse_args()


def _named(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    return name, path


def _texts(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


if __name__ == "__main__":
    main()
