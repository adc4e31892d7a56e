"""`dpkd serve-teacher`: only the cache's teacher, one line when it answers, and nothing left running at its end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from support.commands import Command, dpkd, free_port
from support.vllm_servers import fork_servers

from dpkd.core.errors import UserError
from dpkd.core.models import locate_model
from dpkd.distill.live.teacher import TeacherServers
from dpkd.teacher_cache.engines.engine import ScoreRequest, results_only
from dpkd.teacher_cache.engines.server.http import KEY_VARIABLE
from dpkd.teacher_cache.options.audit import ServeConfig
from dpkd.teacher_cache.serve import serve_teacher, server_command
from dpkd.teacher_cache.store.reader import TeacherCache


@pytest.fixture(autouse=True)
def settings_of_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine in this process leaves settings of its own in the environment."""
    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        monkeypatch.delenv(name)


@contextlib.contextmanager
def serving(*arguments: object, key: str | None = None, forked: bool = True) -> Iterator[Command]:
    """The command; `forked=False` starts its server as users do, in new processes that import vLLM, one by one."""
    environment = {} if key is None else {KEY_VARIABLE: key}
    environment |= {} if forked else {"TORCH_COMPILE_DISABLE": "0"}
    process = Command("serve-teacher", *arguments, environment=environment, prepare=fork_servers if forked else None)
    try:
        yield process
    finally:
        process.kill()


def wait_for(text: Callable[[], str], process: Command) -> str:
    """The first line of what the process has printed, once it is whole."""
    deadline_s = time.monotonic() + 240
    while "\n" not in text():
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    return text().splitlines(keepends=True)[0]


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


@pytest.mark.engine
def test_the_teacher_is_served_until_it_is_stopped(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    port, log = free_port(), tmp_path / "log" / "server.log"
    with serving("--cache", toy_cache, "--port", port, "--log", log, forked=False) as process:
        answers = f"toy-teacher answers at http://127.0.0.1:{port}; Ctrl-C stops it\n"
        assert wait_for(lambda: process.stdout, process) == answers
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert len(family) >= 2
        cache, student = TeacherCache.open(toy_cache), locate_model(str(toy_student), "student")
        row = cache.read(cache.shards("teacher")[0]).row(0)
        with TeacherServers(cache, [f"http://127.0.0.1:{port}"], student, 64, 0.01) as teacher:
            requests = [ScoreRequest(0, row.prompt_ids.tolist(), row.response_ids.tolist())]
            scored = next(iter(results_only(teacher.score(requests))))
        assert abs(scored.logprobs_T - row.response_logprobs).max() < 1e-3
        assert scored.distributions is not None
        assert scored.distributions.counts_T.tolist() == [16] * len(row.response_ids)
        process.send_signal(signal.SIGINT)
        returncode, stdout, stderr = process.finish(60)
        assert returncode == 130
        assert stdout == answers
        assert stderr.splitlines()[0].startswith("starting vLLM with the teacher ")
        assert stderr.splitlines()[-1].startswith("interrupted")
        assert "Traceback" not in stderr
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/health")


@pytest.mark.engine
def test_no_path_answers_without_the_key_and_a_closed_terminal_ends_the_server(toy_cache: Path) -> None:
    port = free_port()
    with serving("--cache", toy_cache, "--port", port, key="secret\n") as process:
        assert "answers at" in wait_for(lambda: process.stdout, process)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            key = {"Authorization": "Bearer secret"}
            assert client.get("/health").status_code == 200
            assert client.get("/v1/models", headers=key).status_code == 200
            paths = client.get("/openapi.json", headers=key).json()["paths"]
            assert {"/invocations", "/tokenize", "/v1/completions"} <= set(paths)
            for path in {
                *paths,
                "/",
                "/docs",
                "/metrics",
                "/openapi.json",
                "/HEALTH",
                "//health",
                "/health/../version",
            }:
                for method in ("GET", "POST", "OPTIONS"):
                    if path != "/health":
                        assert client.request(method, path).status_code == 401, (method, path)
                        wrong = client.request(method, path, headers={"Authorization": "Bearer other"})
                        assert wrong.status_code == 401, (method, path)
        process.send_signal(signal.SIGHUP)
        returncode, _, stderr = process.finish(60)
    assert returncode == 130
    assert f"every path but /health asks for the key in {KEY_VARIABLE}" in stderr
    assert "secret" not in stderr
    assert not psutil.wait_procs(family, timeout=10)[1]


@pytest.mark.engine
def test_the_server_ends_when_its_parent_is_killed(toy_cache: Path) -> None:
    with serving("--cache", toy_cache, "--port", free_port()) as process:
        assert "answers at" in wait_for(lambda: process.stdout, process)
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        process.kill()
    assert not psutil.wait_procs(family, timeout=30)[1]


def test_other_machines_need_a_key_or_a_word(toy_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(UserError, match=r"without a key: found --host 0\.0\.0\.0 and no VLLM_API_KEY.*--insecure"):
        serve_teacher(ServeConfig(cache=toy_cache, host="0.0.0.0"))
    # with either, the next thing that is wrong is found
    with pytest.raises(UserError, match="the server cannot listen on this address"):
        serve_teacher(ServeConfig(cache=toy_cache, host="no.such.host", insecure=True))
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    with pytest.raises(UserError, match="the server cannot listen on this address"):
        serve_teacher(ServeConfig(cache=toy_cache, host="no.such.host"))


@pytest.mark.engine
def test_a_start_can_be_given_up(toy_cache: Path) -> None:
    with serving("--cache", toy_cache, "--port", free_port()) as process:
        assert wait_for(lambda: process.stderr, process).startswith("starting vLLM with the teacher ")
        while not (family := psutil.Process(process.pid).children(recursive=True)):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        returncode, stdout, stderr = process.finish(60)
    assert returncode == 130
    assert stdout == ""
    assert "dpkd failed" not in stderr
    assert not psutil.wait_procs(family, timeout=10)[1]


@pytest.mark.engine
def test_a_server_that_cannot_start_is_a_clear_error(tmp_path: Path, toy_cache: Path) -> None:
    log = tmp_path / "server.log"
    arguments = ("--cache", toy_cache, "--port", free_port(), "--log", log)
    with serving(*arguments, "--engine-arg", "quantization=no-such-method") as process:
        returncode, stdout, stderr = process.finish()
    assert returncode == 2
    assert stdout == ""
    last = stderr.splitlines()[-1]
    assert last.startswith("error: the server stopped before it answered: ")
    assert "rror: " in last.removeprefix("error: ")
    assert f"(in {log}). Look at the log" in last
    assert "no-such-method" in log.read_text()


@pytest.mark.engine
def test_a_server_that_ends_by_itself_is_a_clear_error(toy_cache: Path) -> None:
    with serving("--cache", toy_cache, "--port", free_port()) as process:
        assert "answers at" in wait_for(lambda: process.stdout, process)
        psutil.Process(process.pid).children()[0].kill()
        returncode, _, stderr = process.finish(60)
    assert returncode == 2
    last = stderr.splitlines()[-1]
    assert last == "error: the server has stopped: found status -9. Its output is above"


@pytest.mark.engine
def test_a_server_that_is_too_slow_is_a_clear_error(tmp_path: Path, toy_cache: Path) -> None:
    config = ServeConfig(cache=toy_cache, port=free_port(), log=tmp_path / "log", start_timeout_s=0.01)
    with pytest.raises(UserError, match=r"the server did not answer within 0\.01 s .*--start-timeout-s"):
        serve_teacher(config)


def test_another_teacher_is_refused(toy_cache: Path, toy_student: Path, other_student: Path, tmp_path: Path) -> None:
    for other in (toy_student, other_student):
        with pytest.raises(UserError, match=rf"the teacher is not the one of the cache.*of {other}.*of toy-teacher"):
            serve_teacher(ServeConfig(cache=toy_cache, teacher=str(other)))
    with pytest.raises(UserError, match=r"the teacher is not found"):
        serve_teacher(ServeConfig(cache=toy_cache, teacher=str(tmp_path / "none")))


def test_a_cache_without_its_options_needs_the_teacher(cache_copy: Path) -> None:
    saved = cache_copy / "dpkd.toml"
    for content, problem in (
        ("seed = 0\n", "the cache does not record where its teacher is"),
        ("seed =\n", "the file of options is not TOML"),
        (None, "the file of options is missing"),
    ):
        saved.unlink() if content is None else saved.write_text(content)
        with pytest.raises(UserError, match=rf"{problem}.*\. Give --teacher"):
            serve_teacher(ServeConfig(cache=str(cache_copy)))


def test_a_taken_port_is_one_clear_line(toy_cache: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        started_s = time.monotonic()
        result = dpkd("serve-teacher", "--cache", toy_cache, "--port", port)
        assert result.returncode == 2
        assert result.stderr.startswith(f"error: the port is in use: found 127.0.0.1:{port}")
        assert time.monotonic() - started_s < 60
    with pytest.raises(UserError, match=r"the server cannot listen on this address: .*found no.such.host:8000"):
        serve_teacher(ServeConfig(cache=toy_cache, host="no.such.host", insecure=True))


def test_what_cannot_be_served_is_refused(toy_cache: Path) -> None:
    with pytest.raises(UserError, match=r"--engine-arg max_logprobs is set by dpkd itself"):
        serve_teacher(ServeConfig(cache=toy_cache, engine_arg={"max_logprobs": "7"}))
    with pytest.raises(UserError, match=r"enable_prefix_caching cannot be used when responses are scored"):
        serve_teacher(ServeConfig(cache=toy_cache, engine_arg={"enable_prefix_caching": "true"}))
    with pytest.raises(
        UserError, match=r"are longer than the model's positions: found 600 tokens, expected at most 512"
    ):
        serve_teacher(ServeConfig(cache=toy_cache, max_length=600))
    with pytest.raises(UserError, match=r"CUDA was requested but is not available: found no CUDA device"):
        serve_teacher(ServeConfig(cache=toy_cache, device="cuda"))


def test_the_server_is_told_what_scoring_needs(toy_cache: Path, toy_teacher: Path) -> None:
    cache, teacher = TeacherCache.open(toy_cache), locate_model(str(toy_teacher), "teacher")
    arguments = {"tensor_parallel_size": "2", "enforce_eager": "false", "hf_overrides": '{"a": 1}'}
    config = ServeConfig(cache=toy_cache, port=8123, engine_arg=arguments)
    command = server_command(config, cache, teacher, 268, on_cpu=False)
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    expected = {
        "--model": str(toy_teacher), "--host": "127.0.0.1", "--port": "8123", "--dtype": "float32",
        "--max-model-len": "269", "--max-logprobs": "16", "--logprobs-mode": "raw_logprobs",
        "--tensor-parallel-size": "2", "--hf-overrides": '{"a": 1}',
    }  # fmt: skip
    assert {name: option(command, name) for name in expected} == expected
    assert "--no-enable-prefix-caching" in command
    assert "--no-enforce-eager" in command
    assert "--no-enable-chunked-prefill" not in command
    # a model that ends at 512 positions has no place for the one more
    assert option(server_command(config, cache, teacher, 512, on_cpu=True), "--max-model-len") == "512"
