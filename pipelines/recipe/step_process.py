"""The process of a step: its own from the first line of `dpkd` on, forked from one that has the libraries read.

Reading torch and transformers takes seconds, which a recipe of twenty steps that are complete would spend twenty times.
The process that is forked from reads them once and runs nothing: it holds no model and asks for no device.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess

from dpkd.pipelines.process import EXIT_INTERRUPTED, Terminated

#: what most commands read first
READ_ONCE = ["dpkd.distill.training", "dpkd.evaluate.evaluation", "dpkd.teacher_cache.build.cache"]


def run_command(arguments: Sequence[str]) -> int:
    """Run `dpkd` with `arguments` to its end; the exit status."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(READ_ONCE)
    process = context.Process(target=_dpkd, args=(dict(os.environ), list(arguments)))
    process.start()
    return _wait(process)


def _dpkd(environment: Mapping[str, str], arguments: list[str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["dpkd", *arguments]
    from dpkd.pipelines.cli import main

    main()


def _wait(process: BaseProcess) -> int:
    """Wait for the step, whatever interrupts this process: the step ends in its own orderly way.

    Ctrl-C reaches the step from the terminal; a termination of this process alone is handed on.
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
    return EXIT_INTERRUPTED if interrupted or process.exitcode < 0 else process.exitcode
