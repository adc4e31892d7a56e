"""A vLLM HTTP server on loopback that tests and benchmarks start, kill and start again.

Each of the three processes that vLLM starts on a CPU imports vLLM anew, which takes four fifths of the time of a start,
and two of them spin while they wait for each other. Here two processes are forked from one that has imported vLLM, and
the engine computes in its own; `forked=False` gives a server as users start it.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

from support.commands import enter, fork, free_port

# a seeded request in chunked prefill crashes the CPU build, hence no chunks
ARGUMENTS = [
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-logprobs",
    "128",
    "--no-enable-prefix-caching",
    "--max-model-len",
    "512",
    "--no-enable-chunked-prefill",
    "--max-num-batched-tokens",
    "2048",
]

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two engines must not wait for the same core while another is idle
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
}

_MODULE = ["-m", "vllm.entrypoints.openai.api_server"]
_ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # of the engine and its worker


def _serve(environment: dict[str, str], arguments: list[str], log: Path) -> None:
    """What `python -m vllm.entrypoints.openai.api_server` does, in a forked process whose children are forked too."""
    os.setsid()
    enter(environment, log, log)
    _run_server(arguments)


def _run_server(arguments: list[str]) -> None:
    from vllm.entrypoints.launchers.api_server.entry import main
    from vllm.v1.engine import utils

    # as vLLM does itself, except on CPUs, where threads of OpenMP could be in the way: here is one
    utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    sys.argv = ["api_server", *arguments]
    main()


class _ForkedServer(subprocess.Popen[bytes]):
    """A `Popen` whose server runs in the fork itself, in place of a new Python: pipes, signals and ends are its own."""

    def __init__(self, command: list[str], *arguments: Any, **options: Any) -> None:
        if command[1:3] == _MODULE:
            before = _open_files()
            options["preexec_fn"] = functools.partial(
                _serve_in_fork, command[3:], options["env"], options.get("preexec_fn"), before
            )
        super().__init__(command, *arguments, **options)


def fork_servers() -> None:
    """From now on, a server that this process starts is a fork of it, which has imported vLLM."""
    subprocess.Popen = _ForkedServer  # type: ignore[misc]


def _open_files() -> set[int]:
    found = set()
    for number in (int(path.name) for path in Path("/dev/fd").iterdir()):
        with contextlib.suppress(OSError):
            os.fstat(number)
            found.add(number)
    return found


def _serve_in_fork(
    arguments: list[str], environment: dict[str, str], prepare: Callable[[], None] | None, before: set[int]
) -> None:
    """What follows the fork in `Popen`, to the end of the process."""
    status = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if prepare is not None:
            prepare()
        for number in _open_files() - before - {0, 1, 2}:
            os.close(number)  # `Popen` waits until its pipe is closed, as a new program does it
        os.environ.clear()
        os.environ.update(environment | _ONE_PROCESS)
        _run_server(arguments)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _has_ended(process: subprocess.Popen[bytes] | BaseProcess) -> bool:
    return (process.poll() if isinstance(process, subprocess.Popen) else process.exitcode) is not None


class VllmServer:
    """`python -m vllm.entrypoints.openai.api_server` over `model`; as a context manager it is up inside and dead after.

    `arguments` come after `ARGUMENTS`, so they win; `environment` is added to `ENVIRONMENT`. A server with more than
    one thread cannot be `forked`.
    """

    def __init__(
        self,
        model: Path,
        port: int | None = None,
        arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        forked: bool = True,
    ) -> None:
        self._port, self._forked = port, forked
        self.log = Path(tempfile.mkstemp(prefix="vllm-", suffix=".log")[1])
        self._arguments = ["--model", str(model), "--host", "127.0.0.1", *ARGUMENTS, *arguments]
        # an engine in this process leaves its settings in the environment
        own = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
        self._environment = own | ENVIRONMENT | (_ONE_PROCESS if forked else {}) | (environment or {})
        self._process: subprocess.Popen[bytes] | BaseProcess | None = None

    @property
    def port(self) -> int:
        """The port; a free one is chosen at the first use, so that nothing takes it before the server starts."""
        self._port = self._port or free_port()
        return self._port

    @property
    def url(self) -> str:
        """Address of the server."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server unless it runs, and return at once; `wait` for it before use."""
        if self._process is not None:
            return
        arguments = [*self._arguments, "--port", str(self.port)]
        if self._forked:
            self._process = fork(_serve, self._environment, arguments, self.log)
            return
        command = [sys.executable, *_MODULE, *arguments]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )

    def wait(self, timeout_s: float = 240.0) -> None:
        """Return once `/health` answers; raises `RuntimeError` with the end of the log when it does not."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if self._process is None or _has_ended(self._process):
                break
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
        self.kill()
        raise RuntimeError(f"the vLLM server is not up: {self.log.read_text(errors='replace')[-2000:]}")

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Kill the server and its children (the engine is a process of its own), and wait until they are gone."""
        if self._process is None:
            return
        process, self._process = self._process, None
        assert process.pid is not None
        deadline_s = time.monotonic() + 30
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:  # it has not come to be a group of its own yet, or is gone
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, how)
        while not _has_ended(process):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            while True:  # its children cannot be waited for
                os.killpg(process.pid, signal.SIGKILL)
                time.sleep(0.02)

    def restart(self) -> None:
        """Kill it, start it again on the same port, and wait."""
        self.kill()
        self.start()
        self.wait()

    def close(self) -> None:
        """Kill it and remove its log."""
        self.kill()
        self.log.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.start()
        self.wait()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
