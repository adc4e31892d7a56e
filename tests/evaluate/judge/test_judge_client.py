"""An endpoint that fails: what is retried and when, what ends a run, and where the key never appears."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from itertools import chain, repeat
from typing import Any

import pytest
from support.judge_endpoints import Answer, Endpoint, completion, failure, serving

from dpkd.core.errors import UserError
from dpkd.evaluate.judge.client import JudgeClient, read_key
from dpkd.evaluate.judge.verdicts import Reply
from dpkd.evaluate.options.judge import KEY_VARIABLE, JudgeConfig
from dpkd.teacher_cache.engines.http import RequestRefusedError

KEY = "sk-a-key-of-some-length"
GOOD = completion("Score: 7")


def config_for(url: str, **options: Any) -> JudgeConfig:
    plain = {"report": "r", "out": "o", "judge_url": url, "judge_model": "judge", "retry_delay_s": 0.01, "tries": 3}
    return JudgeConfig.parse(plain | options, where="a test")


def ask(url: str, key: str = "", num: int = 1, **options: Any) -> list[Reply]:
    async def run() -> list[Reply]:
        async with JudgeClient(config_for(url, **options), key) as client:
            messages = [{"role": "user", "content": "How good?"}]
            return list(await asyncio.gather(*(client.ask(messages) for _ in range(num))))

    return asyncio.run(run())


@pytest.fixture
def serve() -> Iterator[Callable[..., Endpoint]]:
    """An endpoint that gives the answers in turn, and the last one from then on."""
    import contextlib

    with contextlib.ExitStack() as stack:

        def start(*answers: Answer) -> Endpoint:
            turn = chain(answers, repeat(answers[-1]))
            return stack.enter_context(serving(lambda body: next(turn)))

        yield start


def test_the_request_is_the_one_that_the_options_say(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve(GOOD)
    options = {"max_tokens": 9, "seed": 3, "extra_body": ['tier="flex"', "seed=null", 'nested={"a": [1]}']}
    assert ask(endpoint.url + "/", KEY, **options) == [Reply("Score: 7", "stop", "judge-0613", 10, 2)]
    assert endpoint.paths == ["/v1/chat/completions"]
    assert endpoint.headers[0]["authorization"] == f"Bearer {KEY}"
    assert endpoint.bodies == [
        {
            "model": "judge",
            "messages": [{"role": "user", "content": "How good?"}],
            "temperature": 0.0,
            "max_tokens": 9,
            "tier": "flex",
            "nested": {"a": [1]},
        }
    ]


def test_without_a_key_none_is_sent(serve: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    # a proxy of the environment is not for this machine
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    endpoint = serve(GOOD)
    ask(endpoint.url)
    assert "authorization" not in endpoint.headers[0]


@pytest.mark.parametrize(
    "trouble",
    [
        failure(429), failure(500), failure(503), failure(529), failure(408),
        (200, {}, b"<html>"), (200, {}, b"[]"), (200, {}, b'{"choices": []}'),
        (200, {}, b'{"choices": [{"message": {"content": 5}}]}'), (200, {"content-length": "900"}, b"{"),
    ],
)  # fmt: skip
def test_temporary_errors_are_retried(serve: Callable[..., Endpoint], trouble: Answer) -> None:
    endpoint = serve(trouble, trouble, GOOD)
    assert ask(endpoint.url, timeout_s=1.0)[0].content == "Score: 7"
    assert len(endpoint.bodies) == 3
    assert endpoint.bodies[0] == endpoint.bodies[2]


def test_lasting_errors_end_with_the_servers_message(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve(failure(500, "out of\n memory"))
    with pytest.raises(UserError, match=r"does not answer: found HTTP 500: out of memory \(the last of 3 tries\)"):
        ask(endpoint.url)
    assert len(endpoint.bodies) == 3


def test_a_missing_server_and_a_slow_one(serve: Callable[..., Endpoint]) -> None:
    with serving(lambda body: GOOD) as gone:
        pass
    with pytest.raises(UserError, match=r"does not answer: found ConnectError.*The verdicts so far are kept"):
        ask(gone.url)

    def slow(body: dict[str, Any]) -> Answer:
        time.sleep(0.5)
        return GOOD

    with serving(slow) as endpoint, pytest.raises(UserError, match=r"found ReadTimeout"):
        ask(endpoint.url, timeout_s=0.05)


def test_delays_grow(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve(failure(500), failure(500), failure(500), GOOD)
    started_s = time.monotonic()
    ask(endpoint.url, retry_delay_s=0.2, tries=4)
    # 0.2, 0.4 and 0.8 s, each drawn from its upper half
    assert 0.7 < time.monotonic() - started_s < 10


@pytest.mark.parametrize("value", ["1", "1.0", "date"])
def test_retry_after_pauses_all_requests(serve: Callable[..., Endpoint], value: str) -> None:
    wish = formatdate(time.time() + 2, usegmt=True) if value == "date" else value  # a date counts whole seconds
    endpoint = serve(failure(429, retry_after=wish), GOOD)
    started_s = time.monotonic()
    ask(endpoint.url)
    assert 0.9 < time.monotonic() - started_s < 10
    # and a question that comes later waits too
    endpoint = serve(failure(429, retry_after="1"), GOOD)

    async def two() -> float:
        async with JudgeClient(config_for(endpoint.url), "") as client:
            first = asyncio.create_task(client.ask([]))
            await asyncio.sleep(0.3)
            await client.ask([])
            await first
        return time.monotonic()

    started_s = time.monotonic()
    assert asyncio.run(two()) - started_s > 0.9


def test_a_wish_that_cannot_be_read_is_none(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve(failure(429, retry_after="soon"), failure(429, retry_after="nan"), GOOD)
    assert ask(endpoint.url)[0].content == "Score: 7"


def test_a_wish_beyond_patience_ends_the_run(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve(failure(429, "quota", retry_after="86400"), GOOD)
    with pytest.raises(UserError, match=r"asks to wait 86400 s: found HTTP 429: quota, expected at most 600 s"):
        ask(endpoint.url)
    assert len(endpoint.bodies) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (failure(401, f"bad key {KEY}"), rf"not accept the key: found HTTP 401: bad key \*\*\*; {KEY_VARIABLE} is set"),
        (failure(403), r"does not accept the key: found HTTP 403"),
        (failure(404, "no model 'judge'"), r"no judge at this address: found HTTP 404: no model 'judge'.*often /v1"),
        (failure(302, location="http://127.0.0.1:9/"), r"the judge redirects: found HTTP 302"),
        (failure(402, "no credit"), r"refuses every request: found HTTP 402: no credit"),
    ],
)  # fmt: skip
def test_what_will_not_pass_ends_at_once(serve: Callable[..., Endpoint], answer: Answer, message: str) -> None:
    endpoint = serve(answer)
    with pytest.raises(UserError, match=message) as caught:
        ask(endpoint.url, KEY)
    assert len(endpoint.bodies) == 1
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refusal_is_about_this_question_alone(serve: Callable[..., Endpoint], status: int) -> None:
    with pytest.raises(RequestRefusedError, match=rf"HTTP {status}: too long"):
        ask(serve(failure(status, "too long")).url)


def test_replies_of_all_kinds(serve: Callable[..., Endpoint]) -> None:
    bare = {"choices": [{"message": {"role": "assistant", "content": None}}]}
    cut = completion(f"I was told {KEY} \ud800", usage=None, model=None)
    endpoint = serve((200, {}, json.dumps(bare).encode()), cut)
    assert ask(endpoint.url, KEY) == [Reply("", None, None, None, None)]
    # neither the key nor half a character goes into a file
    assert ask(endpoint.url, KEY) == [Reply("I was told *** ?", "stop", None, None, None)]


def test_the_key_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "not-asked-for")
    assert read_key(config_for("https://judge.example/v1")) == ""
    assert read_key(config_for("https://judge.example/v1", api_key_env="OPENAI_API_KEY")) == "not-asked-for"
    monkeypatch.setenv(KEY_VARIABLE, f" {KEY}\n")
    assert read_key(config_for("https://judge.example/v1")) == KEY
    with pytest.raises(UserError, match=r"NO_SUCH_KEY is not set .*--api-key-env.*Set it"):
        read_key(config_for("https://judge.example/v1", api_key_env="NO_SUCH_KEY"))
    monkeypatch.setenv(KEY_VARIABLE, "sk-\u00e9")
    with pytest.raises(UserError, match=r"has invalid characters: expected printable ASCII") as caught:
        read_key(config_for("https://judge.example/v1"))
    assert "sk-" not in str(caught.value)


def test_a_key_goes_over_plain_http_to_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    for url in ("http://127.0.0.1:8000/v1", "http://localhost/v1", "http://[::1]:8000/v1", "https://10.0.0.1/v1"):
        assert read_key(config_for(url)) == KEY
    for url in ("http://10.0.0.1:8000/v1", "http://judge.example/v1", "http://localhost.example/v1", "http://127.1/v1"):
        with pytest.raises(UserError, match=r"over plain http to another machine.*--allow-plain-http") as caught:
            read_key(config_for(url))
        assert KEY not in str(caught.value)
        assert read_key(config_for(url, allow_plain_http=True)) == KEY
    monkeypatch.delenv(KEY_VARIABLE)
    assert read_key(config_for("http://10.0.0.1:8000/v1")) == ""  # nothing to be read on the way
