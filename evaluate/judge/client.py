"""One OpenAI-compatible endpoint: chat completions over HTTP with retries and back-off; the key is never shown."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, Self

import httpx

from dpkd.core.errors import UserError
from dpkd.core.progress import say
from dpkd.core.urls import is_loopback
from dpkd.evaluate.judge.verdicts import Reply
from dpkd.evaluate.options.judge import KEY_VARIABLE, JudgeConfig
from dpkd.teacher_cache.engines.server.http import RequestRefusedError

Messages = Sequence[dict[str, str]]

_CONNECT_TIMEOUT_S = 10.0
_LONGEST_DELAY_S = 60.0
_LONGEST_RETRY_AFTER_S = 600.0  # a server that asks for more is out of quota, not busy
_PRINT_EVERY_S = 30.0
_REFUSALS = (400, 413, 422)  # of this question: it is too long, or against the endpoint's rules
_TRANSIENT = (408, 409, 425, 429)


class _TransientError(Exception):
    """A failed try that may succeed later, after `wait_s` if the server named a time."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.wait_s = reason, wait_s


def read_key(config: JudgeConfig) -> str:
    """The key from the environment, or an empty text; raises `UserError` if it cannot be used or must not be sent."""
    variable = config.api_key_env or KEY_VARIABLE
    key = os.environ.get(variable, "").strip()
    if not key:
        if config.api_key_env is not None:
            raise UserError(f"the environment variable {variable} is not set", where="--api-key-env", advice="Set it")
        return ""
    if not (key.isascii() and key.isprintable()):
        # httpx would refuse it with an error that shows the key
        raise UserError(f"the key in {variable} has invalid characters", expected="printable ASCII", where=variable)
    if not config.key_may_be_sent:
        raise UserError(
            "the key would be sent over plain http to another machine, where others can read it",
            found=config.judge_url,
            expected="https, or an address of this machine",
            where="--judge-url",
            advice=f"Use https, unset {variable}, or give --allow-plain-http",
        )
    return key


class JudgeClient:
    """Asks the judge of `config`; an asynchronous context manager for one event loop.

    Texts from the server are returned without the key, even if the server repeats it.
    """

    def __init__(self, config: JudgeConfig, key: str) -> None:
        self._config, self._key = config, key
        self._url = config.judge_url + "/chat/completions"
        host = httpx.URL(config.judge_url).host
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            follow_redirects=False,  # a redirect could take the key elsewhere
            trust_env=not is_loopback(host),  # no proxy for this machine
            timeout=httpx.Timeout(config.timeout_s, connect=_CONNECT_TIMEOUT_S),
            # servers close idle connections: close them first, so that no request meets a closed one
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0),
        )
        self._not_before_s = 0.0  # monotonic clock: the server asked all requests to wait until then
        self._printed_s = -_PRINT_EVERY_S

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._client.aclose()

    async def ask(self, messages: Messages) -> Reply:
        """The judge's reply.

        Raises `RequestRefusedError` if the server will not answer this question, and `UserError` if it answers none:
        at once for a wrong key, model or address, after `config.tries` for transient failures.
        """
        body = self._config.request_body() | {"messages": list(messages)}
        for tries in range(1, self._config.tries + 1):
            await asyncio.sleep(max(0.0, self._not_before_s - time.monotonic()))
            try:
                return await self._post(body)
            except _TransientError as failure:
                reason = failure.reason
                if tries == self._config.tries:
                    break
                self._say(reason)
                await self._wait(failure, tries)
        raise UserError(
            "the judge does not answer",
            found=f"{reason} (the last of {self._config.tries} tries)",
            where=self._url,
            advice="The verdicts so far are kept: run the same command again when it answers",
        )

    async def _wait(self, failure: _TransientError, tries: int) -> None:
        if failure.wait_s is None:
            # random, so that requests that failed together are not repeated together
            delay_s = min(self._config.retry_delay_s * 2.0 ** (tries - 1), _LONGEST_DELAY_S)
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            return
        if failure.wait_s > _LONGEST_RETRY_AFTER_S:
            raise UserError(
                f"the judge asks to wait {failure.wait_s:.0f} s",
                found=failure.reason,
                expected=f"at most {_LONGEST_RETRY_AFTER_S:.0f} s",
                where=self._url,
                advice="The verdicts so far are kept: run the same command after that time",
            )
        self._not_before_s = max(self._not_before_s, time.monotonic() + failure.wait_s)

    async def _post(self, body: dict[str, Any]) -> Reply:
        try:
            response = await self._client.post(self._url, json=body)
        except httpx.RequestError as error:
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise _TransientError(self._clean(reason)) from None
        status = response.status_code
        if status == 200:
            return self._reply(response)
        reason = f"HTTP {status}: {self._message(response)}"
        if status in _TRANSIENT or status >= 500:
            raise _TransientError(reason, _retry_after_s(response.headers.get("retry-after")))
        if status in _REFUSALS:
            raise RequestRefusedError(reason)
        raise self._permanent(status, reason)

    def _permanent(self, status: int, reason: str) -> UserError:
        if status in (401, 403):
            variable = self._config.api_key_env or KEY_VARIABLE
            return UserError(
                "the judge does not accept the key",
                found=f"{reason}; {variable} is {'set' if self._key else 'not set'}",
                where=self._url,
                advice=f"Set {variable} to a key of the endpoint",
            )
        if status == 404:
            advice = "Give --judge-url with the path before /chat/completions (often /v1) and a --judge-model it has"
            return UserError("there is no judge at this address", found=reason, where=self._url, advice=advice)
        if 300 <= status < 400:
            return UserError("the judge redirects", found=reason, where=self._url, advice="Give the final address")
        return UserError(
            "the judge refuses every question", found=reason, where=self._url, advice="Check its documentation"
        )

    def _reply(self, response: httpx.Response) -> Reply:
        try:
            body = response.json()
            choice = body["choices"][0]
            content = choice["message"].get("content")
            if content is not None and not isinstance(content, str):
                raise TypeError("`content` is not text")
            usage = body.get("usage") or {}
            return Reply(
                # a reply may be empty if all tokens went into reasoning
                self._clean(content or ""),
                self._text(choice.get("finish_reason")),
                self._text(body.get("model")),
                _count(usage.get("prompt_tokens")),
                _count(usage.get("completion_tokens")),
            )
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise _TransientError(
                f"the response is not a chat completion ({type(error).__name__}): {self._clean(_short(response.text))}"
            ) from None

    def _message(self, response: httpx.Response) -> str:
        """The server's error message, in one short line."""
        try:
            error = response.json()["error"]
            text = error["message"] if isinstance(error, dict) else error
        except (ValueError, KeyError, TypeError):
            text = response.text
        return _short(self._clean(str(text)))

    def _clean(self, text: str) -> str:
        """`text` without the key, and without lone surrogates, which UTF-8 cannot encode."""
        text = text.replace(self._key, "***") if self._key else text
        return text.encode("utf-8", "replace").decode()

    def _text(self, value: object) -> str | None:
        return self._clean(value) if isinstance(value, str) else None

    def _say(self, reason: str) -> None:
        if time.monotonic() - self._printed_s >= _PRINT_EVERY_S:
            self._printed_s = time.monotonic()
            say(f"{self._url} does not answer ({reason}); trying again")


def _short(text: str) -> str:
    return " ".join(text.split())[:200]


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _retry_after_s(value: str | None) -> float | None:
    """The seconds in a `Retry-After` header, a number or a date; None if it is missing or invalid."""
    if value is None:
        return None
    with suppress(ValueError):
        seconds = float(value)
        return max(0.0, seconds) if seconds == seconds else None
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None
