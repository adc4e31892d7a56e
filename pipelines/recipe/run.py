"""Runs the steps of a recipe in order, each in a process of its own.

Every command skips its finished output, so running a recipe again resumes where it stopped. All steps of all rounds are
validated before the first one starts. A step's process ends before the next one starts, so no memory is shared between
a teacher and a student.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from dpkd.core.progress import say
from dpkd.pipelines.commands.registry import COMMANDS
from dpkd.pipelines.process import EXIT_INTERRUPTED, EXIT_PARTLY, StepFailed, Terminated, run_process
from dpkd.pipelines.recipe.forking import forking_context, obey_parent
from dpkd.pipelines.recipe.format import read_recipe
from dpkd.pipelines.recipe.steps import Step

if TYPE_CHECKING:
    from dpkd.pipelines.commands.options import RunOptions

#: the exit code that multiprocessing gives a process whose forkserver was killed
_FORKSERVER_KILLED = 255


def run(options: RunOptions) -> None:
    """Run a shipped recipe (by name) or a TOML file, or print its steps.

    Raises `StepFailed` with the exit code of the first step that fails. Failed rows do not stop the recipe, but decide
    its exit code.
    """
    steps = read_recipe(options.recipe, options.set)
    if not options.dry_run:
        run_steps(steps, options.recipe)
        return
    for number, step in enumerate(steps, start=1):
        _announce(step, number, len(steps))
        print(f"# {step.title}\n{step.config.to_toml()}")


def run_steps(steps: list[Step], name: str) -> None:
    """Run validated steps; messages call the recipe `name`. Raises `StepFailed` as `run` does."""
    started_s = time.monotonic()
    partly = False
    for number, step in enumerate(steps, start=1):
        _announce(step, number, len(steps))
        step_started_s = time.monotonic()
        status = _run_step(step)
        # a train step ends so only where its recipe lets an alarm end it: the next round starts from its student
        partly |= status == EXIT_PARTLY and step.command != "train"
        if status not in (0, EXIT_PARTLY):
            raise StepFailed(status)
        say(f"== step {number} took {time.monotonic() - step_started_s:.0f} s")
    say(f"== the recipe {name} is complete: {time.monotonic() - started_s:.0f} s")
    if partly:
        raise StepFailed(EXIT_PARTLY)


def _announce(step: Step, number: int, total: int) -> None:
    say(f"== step {number} of {total}: dpkd {step.title} -> {step.out}")


def _run_step(step: Step) -> int:
    process = forking_context().Process(target=_in_child, args=(dict(os.environ), step))
    process.start()
    return _wait(process)


def _in_child(environment: Mapping[str, str], step: Step) -> None:
    os.environ.clear()
    os.environ.update(environment)
    command = f"a recipe's step, dpkd {step.title}, with\n{step.config.to_toml()}"

    def run() -> int:
        obey_parent()
        return COMMANDS[step.command].run(step.config)

    sys.exit(run_process(run, command))


def _wait(process: BaseProcess) -> int:
    """Wait until the step has ended, even if this process is interrupted; the exit code.

    Ctrl-C reaches the step from the terminal; SIGTERM is passed on.
    """
    interrupted = False
    while process.exitcode is None:
        try:
            process.join()
        except Terminated:
            interrupted = True
            process.terminate()
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        return EXIT_INTERRUPTED
    if process.exitcode == _FORKSERVER_KILLED:
        say("the process that starts steps was killed, perhaps because memory ran out; the step ends as if interrupted")
    elif process.exitcode >= 0:
        return process.exitcode
    else:  # it had no time to print anything
        name = signal.Signals(-process.exitcode).name
        say(f"the step was killed ({name}), perhaps because memory ran out; run the same command again to resume")
    return EXIT_INTERRUPTED
