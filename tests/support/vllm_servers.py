"""A vLLM HTTP server on loopback that tests and benchmarks start, kill and start again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Self

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


def free_port() -> int:
    """A port of the loopback address that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class VllmServer:
    """`python -m vllm.entrypoints.openai.api_server` over `model`; as a context manager it is up inside and dead after.

    `arguments` come after `ARGUMENTS`, so they win; `environment` is added to `ENVIRONMENT`.
    """

    def __init__(
        self,
        model: Path,
        port: int | None = None,
        arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self._port = port
        self.log = Path(tempfile.mkstemp(prefix="vllm-", suffix=".log")[1])
        self._command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        self._command += ["--host", "127.0.0.1", *ARGUMENTS, *arguments]
        # an engine in this process leaves its settings in the environment
        own = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
        self._environment = own | ENVIRONMENT | (environment or {})
        self._process: subprocess.Popen[bytes] | None = None

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
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command, "--port", str(self.port)],
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )

    def wait(self, timeout_s: float = 240.0) -> None:
        """Return once `/health` answers; raises `RuntimeError` with the end of the log when it does not."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if self._process is None or self._process.poll() is not None:
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
        group, self._process = self._process, None
        try:
            os.killpg(group.pid, how)
            group.wait(timeout=30)
            while True:  # its children cannot be waited for
                os.killpg(group.pid, signal.SIGKILL)
                time.sleep(0.05)
        except ProcessLookupError:
            group.wait()

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
