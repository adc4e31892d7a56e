"""`dpkd serve-teacher`: a vLLM server with a cache's teacher, set up for `ServerEngine` (checked against vLLM 0.32)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource, locate_model
from dpkd.core.progress import say
from dpkd.core.urls import is_loopback
from dpkd.teacher_cache.engines.engine import EngineOptions
from dpkd.teacher_cache.engines.http import key_in
from dpkd.teacher_cache.engines.open import check_fits, resolve_engine
from dpkd.teacher_cache.engines.server.http import KEY_VARIABLE
from dpkd.teacher_cache.engines.server.key_filter import KeyFilter
from dpkd.teacher_cache.engines.vllm.engine_args import check_engine_args, parse_engine_args
from dpkd.teacher_cache.engines.vllm.environment import own_environment, own_settings, runs_on_cpu
from dpkd.teacher_cache.options.audit import ServeConfig
from dpkd.teacher_cache.store.job import read_saved_options
from dpkd.teacher_cache.store.reader import TeacherCache

_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  (the address to ask if a server listens on all)
_CPU_SEQUENCES = 16  # sequences of full length that fit the KV cache of a server on the CPU
_STOP_S = 20.0
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def serve_teacher(config: ServeConfig) -> None:
    """Run the server until it is interrupted; prints one line with its URL once it answers.

    Raises `UserError` if the teacher is not the cache's, the port is in use, or the server stops by itself.
    """
    _check_guard(config)
    cache = TeacherCache.open(config.cache)
    teacher = locate_model(config.teacher or _teacher_as_built(cache), "teacher")
    cache.check_teacher(teacher, advice="Give --teacher: the model that the cache was built with")
    cache.check_tokenizer(teacher, "teacher")
    resolve_engine("vllm")
    check_engine_args(config.engine_arg, scores=True)
    generation = cache.identities["generation"]
    max_length = config.max_length or int(generation["max_prompt_tokens"]) + int(generation["max_new_tokens"])
    check_fits(teacher, EngineOptions(max_length=max_length, top_k=cache.top_k, dtype=""))
    on_cpu = runs_on_cpu(config.device)
    command = server_command(config, cache, teacher, max_length, on_cpu=on_cpu)
    environment = own_environment(on_cpu=on_cpu) | os.environ
    environment.pop(KEY_VARIABLE, None)
    if key := key_in(KEY_VARIABLE):
        environment[KEY_VARIABLE] = key
    _check_port(config.host, config.port)
    say(f"starting vLLM with the teacher {teacher.name}; {_guard(config)}")
    with _running(command, environment, config.log) as process:
        _wait_until_up(process, config)
        print(f"{_name(cache)} answers at {_url(config.host, config.port)}; Ctrl-C stops it", flush=True)
        process.wait()
        raise _stopped(process, config.log, "the server has stopped")


def server_command(
    config: ServeConfig, cache: TeacherCache, teacher: ModelSource, max_length: int, *, on_cpu: bool
) -> list[str]:
    """The command line of the server."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(teacher.path), "--served-model-name", _name(cache)]
    command += ["--host", config.host, "--port", str(config.port)]
    if key_in(KEY_VARIABLE):
        command += ["--middleware", f"{KeyFilter.__module__}.{KeyFilter.__name__}"]
    command += ["--disable-uvicorn-access-log", "--uvicorn-log-level", "warning"]
    dtype = cache.identities["teacher"]["dtype"]
    settings = own_settings(
        teacher, dtype=dtype, max_length=max_length, top_k=cache.top_k, num_sequences=_CPU_SEQUENCES, on_cpu=on_cpu
    )
    for key, value in (settings | parse_engine_args(config.engine_arg)).items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{name}" if value else f"--no-{name}")
        else:
            command += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return command


def _check_guard(config: ServeConfig) -> None:
    """Raise `UserError` if other machines could use the server without a key, and nobody said that they may."""
    if not key_in(KEY_VARIABLE) and not is_loopback(config.host) and not config.insecure:
        raise UserError(
            "other machines could use the server without a key",
            found=f"--host {config.host} and no {KEY_VARIABLE}",
            expected=f"a key in {KEY_VARIABLE}, or a --host of this machine",
            advice="Set the key here and where you train, or give --insecure in a network that you trust",
        )


def _guard(config: ServeConfig) -> str:
    if key_in(KEY_VARIABLE):
        return f"every path but /health asks for the key in {KEY_VARIABLE}"
    who = "programs on this machine" if is_loopback(config.host) else f"anyone who can reach {config.host}"
    return f"{who} can use it without a key ({KEY_VARIABLE} is not set)"


def _teacher_as_built(cache: TeacherCache) -> str:
    """The --teacher that the cache was built with."""
    advice = "Give --teacher"
    teacher = read_saved_options(cache.folder, advice).get("teacher")
    if teacher is None:
        raise UserError("the cache does not record where its teacher is", where=cache.folder, advice=advice)
    return str(teacher)


def _name(cache: TeacherCache) -> str:
    return str(cache.identities["teacher"]["name"])


def _check_port(host: str, port: int) -> None:
    """Raise `UserError` if no server can listen there."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        raise UserError(
            "the port is in use" if in_use else f"the server cannot listen on this address: {error.strerror}",
            found=f"{host}:{port}",
            advice="Choose another --port" if in_use else "Choose another --host or --port",
        ) from None


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


@contextlib.contextmanager
def _running(command: list[str], environment: dict[str, str], log: Path | None) -> Iterator[subprocess.Popen[bytes]]:
    """The server's process; it and its children are stopped when the block ends."""
    with contextlib.ExitStack() as stack:
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        output: Any = sys.stderr if log is None else stack.enter_context(log.open("wb"))
        # an interrupt inside Popen would leave a server behind, so interrupts wait until it returns
        noted: list[int] = []
        before = _handle({number: lambda number, _: noted.append(number) for number in _INTERRUPTS})
        try:
            # in its own session: a terminal's Ctrl-C reaches only us, and we stop the server
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
                preexec_fn=_ending_with_parent(),
            )
        except BaseException:
            _handle(before)
            raise
        try:
            _handle(before)
            for number in noted:
                signal.raise_signal(number)
            yield process
        finally:
            _stop(process)


def _ending_with_parent() -> Callable[[], None] | None:
    """What makes a new process end when this one is killed and cannot stop it; None where the system has no such way.

    The signal comes when the thread that started the process ends, so this is for the main thread alone.
    """
    if not sys.platform.startswith("linux") or threading.current_thread() is not threading.main_thread():
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def in_new_process() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it was killed before this
            os._exit(1)

    return in_new_process


def _handle(handlers: Mapping[int, Any]) -> dict[int, Any]:
    """Set signal handlers if this is the main thread; returns the previous ones."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number, handler in handlers.items()}


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=_STOP_S)
    except subprocess.TimeoutExpired:
        say("the server does not stop; killing it")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the engine is a separate process
        process.wait()


def _wait_until_up(process: subprocess.Popen[bytes], config: ServeConfig) -> None:
    url = _url(_ANYWHERE.get(config.host, config.host), config.port)
    deadline_s = time.monotonic() + config.start_timeout_s
    while process.poll() is None:
        if time.monotonic() > deadline_s:
            raise UserError(
                f"the server did not answer within {config.start_timeout_s:g} s",
                where=config.log,
                advice="Look at its output, or allow more time with --start-timeout-s",
            )
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).is_success:
                return
        time.sleep(0.25)
    raise _stopped(process, config.log, "the server stopped before it answered")


def _stopped(process: subprocess.Popen[bytes], log: Path | None, what: str) -> UserError:
    cause = None if log is None else _first_error(log)
    return UserError(
        f"{what}{f': {cause}' if cause else ''}",
        found=f"status {process.returncode}",
        where=log,
        advice="Its output is above" if log is None else "Look at the log",
    )


def _first_error(log: Path) -> str | None:
    """The first error in a log: the later ones follow from it."""
    found = re.search(r"\b\w*[Ee]rror: .+", log.read_text(encoding="utf-8", errors="replace"))
    return None if found is None else found.group()[:200]
