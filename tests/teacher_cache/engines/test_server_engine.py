"""The engine over HTTP against real vLLM servers on loopback, behind a proxy where a test needs errors."""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
from support.commands import dpkd, free_port
from support.vllm_servers import VllmServer

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource, locate_model
from dpkd.teacher_cache.engines.engine import (
    Engine,
    EngineOptions,
    EngineResult,
    FailedRequest,
    GenerateRequest,
    Sampling,
    ScoreRequest,
)
from dpkd.teacher_cache.engines.open import open_engine
from dpkd.teacher_cache.engines.server.checks import ServerChecks
from dpkd.teacher_cache.engines.server.engine import ServerEngine
from dpkd.teacher_cache.engines.server.http import KEY_VARIABLE, base_urls
from dpkd.teacher_cache.store.reader import TeacherCache

pytestmark = pytest.mark.engine

PROMPTS = [[5, 9, 33], [7] * 40, [300, 301, 302, 303], [11, 12], [599, 0, 3], [250] * 3]
OPTIONS = EngineOptions(max_length=96, top_k=12, dtype="float32", max_num_seqs=3)
GREEDY = Sampling(0.0, 1.0, 24, (0,))
KEY = "a-key-for-the-odd-one"


@dataclass
class Servers:
    """`one` and `two` hold the toy teacher; `odd` another model, needs a key, and gives processed log-probs."""

    one: VllmServer
    two: VllmServer
    odd: VllmServer


@pytest.fixture(scope="module")
def servers(shared_server: VllmServer, toy_teacher: Path, other_student: Path) -> Iterator[Servers]:
    found = Servers(
        shared_server,
        # takes two requests at a time and answers 503 to more; two names, so that one has to be chosen
        VllmServer(toy_teacher, arguments=["--max-num-queued-reqs", "2", "--served-model-name", "first", "second"]),
        VllmServer(other_student, arguments=["--logprobs-mode", "processed_logprobs"], environment={KEY_VARIABLE: KEY}),
    )
    with contextlib.ExitStack() as stack:
        for server in (found.two, found.odd):
            stack.callback(server.close)
        found.one.start()
        found.two.start()
        found.one.wait()
        found.two.wait()
        found.odd.start()  # needed late: it comes up while the first tests run
        yield found


@pytest.fixture
def two(servers: Servers) -> VllmServer:
    servers.two.start()  # where a test has left it dead
    servers.two.wait()
    return servers.two


@pytest.fixture(scope="module")
def odd(servers: Servers) -> VllmServer:
    servers.odd.wait()
    return servers.odd


@pytest.fixture(scope="module")
def teacher(toy_teacher: Path) -> ModelSource:
    return locate_model(str(toy_teacher), "teacher")


@pytest.fixture(scope="module")
def server(servers: Servers, teacher: ModelSource) -> Iterator[ServerEngine]:
    with connect(teacher, servers.one.url) as engine:
        yield engine


@pytest.fixture(scope="module")
def transformers(teacher: ModelSource) -> Iterator[Engine]:
    with open_engine("transformers", teacher, OPTIONS) as engine:
        yield engine


def connect(model: ModelSource, *urls: str, options: EngineOptions = OPTIONS, **limits: float) -> ServerEngine:
    return ServerEngine(model, replace(options, server_urls=urls), **limits)  # type: ignore[arg-type]


def requests(count: int = len(PROMPTS)) -> Iterator[GenerateRequest]:
    return (GenerateRequest(i, PROMPTS[i % len(PROMPTS)], seed=100 + i) for i in range(count))


def generate(engine: Engine, sampling: Sampling = GREEDY, count: int = len(PROMPTS)) -> dict[int, EngineResult]:
    return by_index(engine.generate(requests(count), sampling))


def by_index(answers: Iterable[EngineResult | FailedRequest]) -> dict[int, EngineResult]:
    found = {}
    for answer in answers:
        assert isinstance(answer, EngineResult), answer
        assert answer.index not in found
        found[answer.index] = answer
    return found


def score(engine: Engine, responses: dict[int, EngineResult]) -> dict[int, EngineResult]:
    return by_index(engine.score(ScoreRequest(i, PROMPTS[i], drawn.response_ids) for i, drawn in responses.items()))


def assert_same(one: dict[int, EngineResult], two: dict[int, EngineResult], tolerance: float = 1e-3) -> None:
    """The same ids, and log-probs within `tolerance` nats."""
    assert sorted(one) == sorted(two) == list(range(len(PROMPTS)))
    for index, ours in one.items():
        theirs = two[index]
        assert ours.response_ids.tolist() == theirs.response_ids.tolist()
        assert ours.response_ids.dtype == theirs.response_ids.dtype
        assert ours.logprobs_T.dtype == theirs.logprobs_T.dtype
        assert np.abs(ours.logprobs_T - theirs.logprobs_T).max() < tolerance
        assert ours.distributions is not None
        assert theirs.distributions is not None
        assert ours.distributions.counts_T.tolist() == theirs.distributions.counts_T.tolist()
        assert np.abs(ours.distributions.logprobs_E - theirs.distributions.logprobs_E).max() < tolerance
        assert (ours.distributions.ids_E == theirs.distributions.ids_E).mean() > 0.99
        assert np.abs(ours.distributions.log_tail_T - theirs.distributions.log_tail_T).max() < 10 * tolerance


Fault = int | str | None


@dataclass
class Proxy:
    """Forwards requests to a real server. `fault` may return a status to answer, `drop`, or seconds to wait."""

    target: str
    fault: Callable[[str, bytes], Fault] = lambda path, body: None
    in_flight: int = 0
    most_in_flight: int = 0
    served: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    client: httpx.Client = field(default_factory=partial(httpx.Client, timeout=60.0))

    def answer(self, path: str, method: str, body: bytes) -> tuple[int, bytes] | None:
        """Status and content; None to hang up."""
        fault = self.fault(path, body)
        if fault == "drop":
            return None
        if isinstance(fault, float):
            time.sleep(fault)
            return None
        if isinstance(fault, int):
            return fault, b'{"error": {"message": "a fault"}}'
        headers = {"content-type": "application/json"} if body else {}
        answer = self.client.request(method, self.target + path, content=body, headers=headers, timeout=60)
        return answer.status_code, answer.content

    def count(self, change: int) -> None:
        with self.lock:
            self.in_flight += change
            self.served += change > 0
            self.most_in_flight = max(self.most_in_flight, self.in_flight)


@contextlib.contextmanager
def proxied(proxy: Proxy) -> Iterator[str]:
    """The address of a running `proxy`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send(proxy.answer(self.path, "GET", b""))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            proxy.count(1)
            try:
                answer = proxy.answer(self.path, "POST", body)
            finally:
                proxy.count(-1)  # before the answer is sent: who has it may ask again at once
            self.send(answer)

        def send(self, answer: tuple[int, bytes] | None) -> None:
            if answer is None:
                return
            status, content = answer
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.send_header("location", "http://127.0.0.1:9/")
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_address[1]}"
        finally:
            http.shutdown()
            thread.join()
            proxy.client.close()


# the same results as the engines in this process


def test_greedy_responses_are_those_of_transformers(server: ServerEngine, transformers: Engine) -> None:
    ours, theirs = generate(server), generate(transformers)
    assert_same(ours, theirs)
    assert {i: result.finish_reason for i, result in ours.items()} == {
        i: result.finish_reason for i, result in theirs.items()
    }


def test_sampled_responses_are_scored_the_same_by_both(server: ServerEngine, transformers: Engine) -> None:
    drawn = generate(server, Sampling(0.7, 0.9, 24, (0,)))
    assert_same(drawn, score(server, drawn))
    assert_same(drawn, score(transformers, drawn))


def test_what_vllm_draws_in_this_process_the_server_draws_too(server: ServerEngine, teacher: ModelSource) -> None:
    sampling = Sampling(1.0, 1.0, 24, (0,))
    with open_engine("vllm", teacher, OPTIONS) as vllm:
        assert_same(generate(server, sampling), generate(vllm, sampling))
    gc.collect()


def test_stop_tokens_end_a_response_and_are_kept(server: ServerEngine, transformers: Engine) -> None:
    first = generate(server)[0].response_ids.tolist()
    for stop in (first[2], first[5]):
        sampling = replace(GREEDY, stop_token_ids=(stop, 1))
        ours, theirs = generate(server, sampling), generate(transformers, sampling)
        assert_same(ours, theirs)
        assert ours[0].finish_reason == "stop"
        assert ours[0].response_ids.tolist() == first[: first.index(stop) + 1]


def test_the_end_of_a_response_is_part_of_it(server: ServerEngine, transformers: Engine) -> None:
    sampling = Sampling(1.0, 1.0, 60, (0, *range(100, 160)))
    drawn = generate(server, sampling)
    ended = [result for result in drawn.values() if result.finish_reason == "stop"]
    assert ended
    for result in ended:
        assert result.response_ids[-1] in sampling.stop_token_ids
        assert not set(result.response_ids[:-1].tolist()) & set(sampling.stop_token_ids)
    assert_same(drawn, score(transformers, drawn))


def test_top_mass_keeps_the_smallest_set_that_reaches_it(servers: Servers, teacher: ModelSource) -> None:
    with connect(teacher, servers.one.url, options=replace(OPTIONS, top_mass=0.1)) as engine:
        drawn = generate(engine)
        for result in drawn.values():
            kept = result.distributions
            assert kept is not None
            assert kept.counts_T.min() < OPTIONS.top_k
            for logprobs in np.split(kept.logprobs_E, kept.counts_T.cumsum()[:-1]):
                mass = np.exp(logprobs.astype(np.float64))
                assert mass[:-1].sum() < 0.1
                assert mass.sum() >= 0.1 or len(mass) == OPTIONS.top_k
        assert_same(drawn, score(engine, drawn))


def test_without_a_top_k_there_are_log_probs_and_no_distributions(
    servers: Servers, teacher: ModelSource, transformers: Engine
) -> None:
    with connect(teacher, servers.one.url + "/v1/", options=replace(OPTIONS, top_k=0)) as engine:
        drawn = generate(engine)
        again, reference = score(engine, drawn), score(transformers, drawn)
    for index, result in drawn.items():
        assert result.distributions is None
        assert again[index].distributions is None
        assert np.abs(result.logprobs_T - reference[index].logprobs_T).max() < 1e-3
        assert np.abs(again[index].logprobs_T - reference[index].logprobs_T).max() < 1e-3


# places in flight


def test_places_are_bounded_and_shared_out(servers: Servers, teacher: ModelSource) -> None:
    proxies = [Proxy(servers.one.url), Proxy(servers.one.url)]
    pulled = 0

    def source() -> Iterator[GenerateRequest]:
        nonlocal pulled
        for pulled, request in enumerate(requests(40), start=1):  # noqa: B007
            yield request

    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(proxied(proxy)) for proxy in proxies]
        engine = stack.enter_context(connect(teacher, *urls))
        for proxy in proxies:
            proxy.most_in_flight = proxy.served = 0
        for taken, _ in enumerate(engine.generate(source(), GREEDY), start=1):
            assert pulled <= taken + 2 * OPTIONS.max_num_seqs
    assert [proxy.most_in_flight for proxy in proxies] == [OPTIONS.max_num_seqs] * 2
    assert sum(proxy.served for proxy in proxies) == 40
    assert min(proxy.served for proxy in proxies) >= 10


def test_an_abandoned_generation_leaves_the_engine_usable(server: ServerEngine, transformers: Engine) -> None:
    for _ in range(5):
        results = server.generate(requests(12), replace(GREEDY, max_new_tokens=50))
        next(results)
        results.close()  # type: ignore[attr-defined]
    assert_same(generate(server), generate(transformers))


# requests that fail, and servers that are in the way


def test_a_refused_request_fails_alone(server: ServerEngine) -> None:
    asked = [ScoreRequest(i, [5, 6], [7, 800 if i == 2 else 8]) for i in range(5)]
    answers = {answer.index: answer for answer in server.score(asked)}
    failed = answers.pop(2)
    assert isinstance(failed, FailedRequest)
    assert failed.reason == "HTTP 400: Token id 800 is out of vocabulary"
    assert sorted(by_index(answers.values())) == [0, 1, 3, 4]


def test_a_full_server_is_asked_again(two: VllmServer, teacher: ModelSource, transformers: Engine) -> None:
    # vLLM answers 503 to the third request in flight
    with connect(teacher, two.url, options=replace(OPTIONS, max_num_seqs=6)) as engine:
        assert_same(generate(engine), generate(transformers))


@pytest.mark.parametrize("fault", [429, 500, 502, "drop", 5.0])
def test_temporary_errors_are_retried(
    servers: Servers, teacher: ModelSource, transformers: Engine, fault: Fault
) -> None:
    left = itertools.chain([fault] * 2, itertools.repeat(None))
    proxy = Proxy(servers.one.url)
    with proxied(proxy) as url, connect(teacher, url, timeout_s=4.0) as engine:
        proxy.fault = lambda path, _: next(left) if path == "/v1/completions" else None
        assert_same(generate(engine), generate(transformers))


@pytest.mark.parametrize(("fault", "tries"), [(500, 3), ("drop", 5)])
def test_a_request_that_always_fails_is_given_up(
    servers: Servers, teacher: ModelSource, fault: Fault, tries: int, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy = Proxy(servers.one.url, lambda _, body: fault if b'"prompt":[11,12]' in body else None)
    with proxied(proxy) as url, connect(teacher, url) as engine:
        answers = {answer.index: answer for answer in engine.generate(requests(), GREEDY)}
    failed = answers.pop(3)
    assert isinstance(failed, FailedRequest)
    assert failed.reason.startswith(f"no answer in {tries} attempts: ")
    assert len(by_index(answers.values())) == len(PROMPTS) - 1
    assert "does not answer" not in capsys.readouterr().err


def test_a_server_that_stays_busy_ends_patience(servers: Servers, teacher: ModelSource) -> None:
    proxy = Proxy(servers.one.url)
    with proxied(proxy) as url, connect(teacher, url, patience_s=3.0) as engine:
        proxy.fault = lambda path, _: 429 if path == "/v1/completions" else None
        with pytest.raises(UserError, match=r"no server has answered for 3 s: found HTTP 429: a fault \(in http://"):
            generate(engine)


def test_a_server_that_hangs_ends_patience(
    servers: Servers, teacher: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pool._QUIET_S", "pool._SILENCE_S", "http._HEALTH_TIMEOUT_S"):
        monkeypatch.setattr(f"dpkd.teacher_cache.engines.server.{name}", 0.5)
    proxy = Proxy(servers.one.url)
    with proxied(proxy) as url, connect(teacher, url, patience_s=3.0) as engine:
        proxy.fault = lambda *_: 2.0
        with pytest.raises(UserError, match="no server has answered for 3 s: found ReadTimeout"):
            generate(engine)


def test_one_of_several_models_is_chosen_by_name(two: VllmServer, toy_student: Path) -> None:
    refused(
        "has several models and none has the teacher's name: found first, second, expected .*toy-student",
        locate_model(str(toy_student), "teacher"),
        two.url,
    )


# an outage: one server is killed under three jobs, and comes back


@dataclass
class Outage:
    moved: dict[int, EngineResult] = field(default_factory=dict)
    moved_in_s: float = 0.0
    given_up: UserError | None = None
    waited: dict[int, EngineResult] = field(default_factory=dict)
    undisturbed: dict[int, EngineResult] = field(default_factory=dict)
    stopped: dict[int, EngineResult] = field(default_factory=dict)
    said: str = ""


@pytest.fixture(scope="module")
def outage(servers: Servers, teacher: ModelSource) -> Outage:
    found = Outage()
    said = io.StringIO()
    one, two = servers.one.url, servers.two.url
    options = replace(OPTIONS, max_num_seqs=2)
    sampling = replace(GREEDY, max_new_tokens=50)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(said))
        engines = [
            stack.enter_context(connect(teacher, *urls, options=options, patience_s=patience_s))
            for urls, patience_s in (((one, two), 200.0), ((two,), 3.0), ((two,), 200.0))
        ]
        found.undisturbed = generate(engines[0], sampling, 16)
        moving, giving_up, waiting = (engine.generate(requests(16), sampling) for engine in engines)
        first = [next(moving), next(waiting)]
        next(giving_up)
        started_s = time.monotonic()
        servers.two.kill()
        found.moved = by_index([first[0], *moving])
        found.moved_in_s = time.monotonic() - started_s
        with pytest.raises(UserError) as error:
            list(giving_up)
        found.given_up = error.value
        engines[1].close()
        servers.two.start()
        found.waited = by_index([first[1], *waiting])
        deadline_s = time.monotonic() + 60
        while not all(server.up for server in engines[0]._pool.servers):  # each engine notices by itself
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        stopping = engines[0].generate(requests(16), sampling)
        first = [next(stopping)]
        servers.two.kill(signal.SIGTERM)
        found.stopped = by_index([*first, *stopping])
    found.said = said.getvalue()
    return found


def assert_undisturbed(found: dict[int, EngineResult], undisturbed: dict[int, EngineResult]) -> None:
    assert sorted(found) == sorted(undisturbed) == list(range(16))
    for index, result in found.items():
        assert result.response_ids.tolist() == undisturbed[index].response_ids.tolist()
        assert np.abs(result.logprobs_T - undisturbed[index].logprobs_T).max() < 1e-3


def test_work_moves_from_a_killed_server_to_the_living_one_at_once(outage: Outage) -> None:
    assert_undisturbed(outage.moved, outage.undisturbed)
    assert outage.moved_in_s < 25  # a server that is only silent is given up after 30


def test_a_job_survives_that_its_server_is_killed_and_started_again(outage: Outage, servers: Servers) -> None:
    assert_undisturbed(outage.waited, outage.undisturbed)
    assert (
        len(re.findall(rf"^{servers.two.url} does not answer \(.+\); waiting for it, up to 200 s$", outage.said, re.M))
        == 1
    )
    assert f"{servers.two.url} answers again\n" in outage.said


def test_a_server_that_is_stopped_cuts_no_response(outage: Outage) -> None:
    # on SIGTERM, vLLM ends what is in flight as HTTP 200 with finish_reason "abort"
    assert_undisturbed(outage.stopped, outage.undisturbed)
    assert outage.said.count("its requests go to the others") == 2


def test_patience_ends_while_no_server_answers(outage: Outage, servers: Servers) -> None:
    assert re.fullmatch(
        rf"no server has answered for 3 s: found .+ \(in {servers.two.url}\)\. "
        "Committed shards are kept. Start the servers and run the same command again: it resumes",
        str(outage.given_up),
    )


# opening


def refused(match: str, model: ModelSource, *urls: str, **changes: object) -> None:
    with pytest.raises(UserError, match=match):
        connect(model, *urls, options=replace(OPTIONS, **changes), patience_s=20.0).close()  # type: ignore[arg-type]


def test_no_address_is_an_error(teacher: ModelSource) -> None:
    refused("the engine server needs the address of a server. Give --server-url", teacher)


def test_a_cache_is_filled_by_both_servers(servers: Servers, toy_teacher: Path, toy_data: Path, tmp_path: Path) -> None:
    """Two flags on the command line are two servers."""
    proxies = [Proxy(servers.one.url), Proxy(servers.one.url)]
    with contextlib.ExitStack() as stack:
        flags = [part for proxy in proxies for part in ("--server-url", stack.enter_context(proxied(proxy)))]
        made = dpkd(
            "cache-teacher", "--teacher", toy_teacher, "--data", toy_data, "--out", tmp_path / "cache", "--limit", 12,
            "--template", "chat", "--max-new-tokens", 8, "--max-num-seqs", 2, "--engine", "server", *flags,
        )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert TeacherCache.open(tmp_path / "cache").manifest.counts["rows"] == 12
    assert min(proxy.served for proxy in proxies) >= 3


def test_addresses_are_taken_with_and_without_v1() -> None:
    urls = ["http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/", "https://b/gate/v1"]
    assert base_urls(urls) == ["http://a:1", "https://b/gate"]
    for wrong in ("localhost:8000", "ftp://a", "a"):
        with pytest.raises(
            UserError, match=r"a server's address is not an HTTP address: found '.+', expected http://HOST:PORT"
        ):
            base_urls([wrong])
    with pytest.raises(UserError, match=r"the address of the server a contains a password\. Set VLLM_API_KEY") as error:
        base_urls(["http://me:secret@a/v1"])
    assert "secret" not in str(error.value)


def test_a_server_that_does_not_answer_is_an_error(teacher: ModelSource, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=rf"no server has answered for 1 s: found ConnectError.* \(in {url}\)"):
        connect(teacher, url, patience_s=1.0)
    assert capsys.readouterr().err.count(f"{url} does not answer") == 1


def test_a_server_that_is_down_at_the_start_is_done_without(servers: Servers, teacher: ModelSource) -> None:
    with connect(teacher, f"http://127.0.0.1:{free_port()}", servers.one.url) as engine:
        assert len(generate(engine)) == len(PROMPTS)


def test_more_log_probs_than_the_server_gives_are_an_error(servers: Servers, teacher: ModelSource) -> None:
    refused(
        r"fewer log-probs per position than top-k: found HTTP 400: .* 128.*, expected 200 .* --max-logprobs 200",
        teacher,
        servers.one.url,
        top_k=200,
    )


def test_longer_sequences_than_the_server_takes_are_an_error(servers: Servers, teacher: ModelSource) -> None:
    with connect(teacher, servers.one.url, options=replace(OPTIONS, max_length=512)):
        pass  # all the positions that the teacher has
    longer = replace(teacher)  # its config is read anew
    longer.config.max_position_embeddings = 4096
    refused("too short .*: found 512 tokens, expected at least 601", longer, servers.one.url, max_length=600)


def test_another_key_is_an_error(odd: VllmServer, other_student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = locate_model(str(other_student), "teacher")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    refused(r"does not accept the key: found HTTP 401, VLLM_API_KEY is not set .*Set VLLM_API_KEY", model, odd.url)
    monkeypatch.setenv(KEY_VARIABLE, "wrong-key")
    with pytest.raises(UserError, match="found HTTP 401, VLLM_API_KEY is set") as error:
        connect(model, odd.url)
    assert "wrong-key" not in str(error.value)
    monkeypatch.setenv(KEY_VARIABLE, "a\nkey")
    with pytest.raises(UserError, match="the key in VLLM_API_KEY has invalid characters"):
        connect(model, odd.url)
    monkeypatch.setenv(KEY_VARIABLE, KEY + "\n")  # as `cat` gives it from a file
    refused("log-probs after temperature", model, odd.url)


def test_redirects_are_not_followed(servers: Servers, teacher: ModelSource) -> None:
    with proxied(Proxy(servers.one.url, lambda *_: 307)) as url:
        refused("the server redirects: found HTTP 307", teacher, url)


def test_something_else_than_vllm_is_an_error(servers: Servers, teacher: ModelSource) -> None:
    with proxied(Proxy(servers.one.url, lambda *_: 200)) as url:
        refused("the server does not answer like vLLM: found KeyError", teacher, url)


def test_servers_with_different_models_are_an_error(
    servers: Servers, odd: VllmServer, teacher: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def passed(*_: object) -> None:
        pass

    monkeypatch.setenv(KEY_VARIABLE, KEY)
    # the odd server is wrong in two more ways, and which check of which server comes first is a matter of timing
    monkeypatch.setattr(ServerChecks, "_check_tokenizer", passed)
    monkeypatch.setattr(ServerChecks, "_check_raw", passed)
    one, other = servers.one.url, odd.url
    refused(
        r"have different models: found log-probs -\d+\.\d+ and -\d+\.\d+ nats "
        rf"of the same token \(in ({one} and {other}|{other} and {one})\)",
        teacher,
        one,
        other,
    )


def test_another_tokenizer_is_an_error(odd: VllmServer, teacher: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    refused(r"tokenizer is not the teacher's: found ids \[.+\]\.\.\., expected \[.+\]", teacher, odd.url)


def test_log_probs_after_temperature_are_an_error(
    odd: VllmServer, other_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    refused(
        r"returns log-probs after temperature: found -.+ and -.+ nats .*--logprobs-mode raw_logprobs",
        locate_model(str(other_student), "teacher"),
        odd.url,
    )
