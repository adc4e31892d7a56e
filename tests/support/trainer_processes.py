"""`dpkd train` in new processes, forked from a server that has imported everything, so they start at once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def arguments(options: dict[str, Any]) -> list[str]:
    return ["train", *(part for key, value in options.items() for part in ("--set", f"{key}={value}"))]


def rank_main(environment: dict[str, str], given: list[str], said: Path) -> None:
    """One process of the command line, as its environment tells it who it is."""
    os.environ |= environment
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["dpkd", *given]
    from dpkd.pipelines.cli import main

    main()


def start(environment: dict[str, str], options: dict[str, Any], said: Path) -> BaseProcess:
    """A process that trains with `options` and says what it says to a file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dpkd.distill.training", "dpkd.pipelines.cli", "transformers.models.llama"])
    process = context.Process(target=rank_main, args=(environment, arguments(options), said))
    process.start()
    return process


class TwoRanks:
    """Two processes of one run."""

    def __init__(self, directory: Path, options: dict[str, Any]) -> None:
        shared = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        self._said = [directory / f"rank-{rank}.txt" for rank in range(2)]
        self.processes = [
            start(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, options, said)
            for rank, said in enumerate(self._said)
        ]

    def finish(self, status: int = 0) -> list[str]:
        """What each rank said; both must end with `status`."""
        for process in self.processes:
            process.join(timeout=240)
        texts = [path.read_text() for path in self._said]
        assert [process.exitcode for process in self.processes] == [status] * 2, "\n".join(texts)
        return texts
