"""Commands of dpkd: in this process, or in processes of their own that start at once.

A new Python takes seconds to import torch. A test that needs no process of its own calls `dpkd`; one that kills or
interrupts a command starts a `Command`, which is forked from a server that has imported the libraries.
"""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import socket
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

#: vLLM is here too: its import takes longer than what most tests do with it
PRELOAD = [
    "dpkd.distill.training",
    "dpkd.evaluate.evaluation",
    "dpkd.pipelines.cli",
    "transformers.models.llama",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.openai.api_server",
    "vllm.model_executor.models.llama",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "support.frozen",
]


class Result(NamedTuple):
    """How a command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def dpkd(*arguments: object) -> Result:
    """Run `dpkd ARGUMENTS` in this process, as `main` does. Output of child processes is not in the result."""
    from dpkd.pipelines.cli import run
    from dpkd.pipelines.process import run_process

    words = list(map(str, arguments))
    stdout, stderr = StringIO(), StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    with redirect_stdout(stdout), redirect_stderr(stderr):
        returncode = run_process(lambda: run(words), "a test")
    signal.signal(signal.SIGTERM, handler)
    return Result(returncode, stdout.getvalue(), stderr.getvalue())


@functools.cache
def start_forkserver() -> None:
    """Start the process that imports `PRELOAD`; returns at once."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    # vLLM sets its log up while it is imported; `support` must be found, which 3.11 does not see to
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    with patch.dict(os.environ, VLLM_LOGGING_LEVEL="ERROR", PYTHONPATH=path):
        multiprocessing.forkserver.ensure_running()


def fork(main: Callable[..., None], *arguments: object) -> BaseProcess:
    """A process that runs `main`, forked from the one that has imported the libraries."""
    start_forkserver()
    process = multiprocessing.get_context("forkserver").Process(target=main, args=arguments)
    process.start()
    return process


def enter(environment: Mapping[str, str], stdout: Path, stderr: Path) -> None:
    """Give this forked process its environment, and files for its output, which it appends to."""
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, stdout), (2, stderr)):
        with path.open("a") as file:
            os.dup2(file.fileno(), number)


def _main(environment: Mapping[str, str], words: list[str], output: Path, prepare: Callable[[], None] | None) -> None:
    enter(environment, output / "stdout", output / "stderr")
    if prepare is not None:
        prepare()
    sys.argv = ["dpkd", *words]
    from dpkd.pipelines.cli import main

    main()


def fork_steps() -> None:
    """This process of a recipe has imported the libraries already: its steps need no other one that imports them."""
    from dpkd.pipelines.recipe import run

    run.forking_context = lambda: multiprocessing.get_context("fork")  # type: ignore[assignment,return-value]


class Command:
    """`dpkd ARGUMENTS` in a process of its own, which calls `prepare` before it begins.

    `environment` is added to that of the tests.
    """

    def __init__(
        self,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._output = Path(tempfile.mkdtemp(prefix="dpkd-test-"))
        weakref.finalize(self, shutil.rmtree, self._output, ignore_errors=True)
        words, environment = list(map(str, arguments)), dict(os.environ) | dict(environment or {})
        self._process = fork(_main, environment, words, self._output, prepare)

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def stdout(self) -> str:
        """What it has written to standard output so far."""
        return self._read("stdout")

    @property
    def stderr(self) -> str:
        """What it has written to standard error so far."""
        return self._read("stderr")

    def _read(self, name: str) -> str:
        path = self._output / name
        return path.read_text() if path.is_file() else ""

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to this process alone."""
        os.kill(self.pid, number)

    def finish(self, timeout_s: float = 240) -> Result:
        """Wait for its end; fails after `timeout_s` seconds."""
        self._process.join(timeout_s)
        code = self._process.exitcode
        assert code is not None, f"no end after {timeout_s} s: {self.stderr}"
        return Result(code, self.stdout, self.stderr)

    def kill(self) -> Result:
        """SIGKILL, and wait for the end."""
        self._process.kill()
        return self.finish()


def free_port() -> int:
    """A port of the loopback address that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def train_arguments(options: Mapping[str, Any]) -> list[str]:
    """Every option by `--set`; a list as a flag that is given several times."""
    words = ["train"]
    for key, value in options.items():
        for item in value if isinstance(value, list) else ():
            words += [f"--{key.replace('_', '-')}", str(item)]
        words += [] if isinstance(value, list) else ["--set", f"{key}={value}"]
    return words


class TwoRanks:
    """Two processes of one run."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        shared = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        self.processes = [
            Command(*train_arguments(options), environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]

    def finish(self, status: int = 0) -> list[str]:
        """What each rank printed; both must end with `status`."""
        results = [process.finish() for process in self.processes]
        texts = [result.stdout + result.stderr for result in results]
        assert [result.returncode for result in results] == [status] * 2, "\n".join(texts)
        return texts
