"""HTTP to one OpenAI-compatible endpoint: retries with back-off, `Retry-After`, and a key that is never shown.

The teacher's endpoint and the judge's use it. The `openai` package is not used: it follows redirects, reads addresses
from the environment, and is installed only where vLLM is, which a teacher behind an endpoint does not need.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Self, TypeVar

import httpx

from dpkd.core.errors import UserError
from dpkd.core.progress import say
from dpkd.core.urls import exposes_key
from dpkd.teacher_cache.engines.http import RequestRefusedError, cause_of, key_in, message_of, open_client, shortened

_CONNECT_TIMEOUT_S = 10.0
_LONGEST_DELAY_S = 60.0
_LONGEST_RETRY_AFTER_S = 600.0  # a server that asks for more is out of quota, not busy
_PRINT_EVERY_S = 30.0
_REFUSALS = (400, 413, 422)  # of this request: it is too long, or against the endpoint's rules
_TRANSIENT = (408, 409, 425, 429)

Answer = TypeVar("Answer")


class _TransientError(Exception):
    """A failed try that may succeed later, after `wait_s` if the server named a time."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.wait_s = reason, wait_s


@dataclass(frozen=True)
class Endpoint:
    """One endpoint: what errors call it, its base URL, and how long to try.

    Args:
        name: what it is, such as "judge".
        url: the URL before `/chat/completions` or `/completions`.
        key: the API key, or an empty text; `key_variable` is the environment variable that it comes from.
        timeout_s: longest wait for an answer, in seconds.
        tries: attempts per request before the job stops.
        retry_delay_s: wait before the second attempt, in seconds; then doubled.
        kept: what the user keeps when the job stops, a sentence up to a colon.
        missing: what to do when nothing is at the address.
    """

    name: str
    url: str
    key: str
    key_variable: str
    timeout_s: float
    tries: int
    retry_delay_s: float
    kept: str
    missing: str


def read_key(
    variable: str | None,
    default: str,
    url: str,
    url_flag: str,
    *,
    allow_plain_http: bool = False,
    to_allow: str | None = None,
) -> str:
    """The key for the endpoint at `url`, from the environment; an empty text if there is none.

    Args:
        variable: the environment variable that the user named, which must be set; None: `default`, if that is set.
        url_flag: the option that gave `url`.
        allow_plain_http: whether the key may go over plain http to another machine.
        to_allow: what the user can do to allow that, for the error's advice; None: nothing.

    Raises `UserError` if `variable` is not set, or if the key cannot be used or must not be sent.
    """
    name = variable or default
    if not (key := key_in(name)):
        if variable is not None:
            raise UserError(f"the environment variable {name} is not set", where="--api-key-env", advice="Set it")
        return ""
    if exposes_key(url) and not allow_plain_http:
        raise UserError(
            "the key would be sent over plain http to another machine, where others can read it",
            found=url,
            expected="https, or an address of this machine",
            where=url_flag,
            advice=f"Use https, or unset {name}" if to_allow is None else f"Use https, unset {name}, or {to_allow}",
        )
    return key


class EndpointClient:
    """Posts JSON to an endpoint; an asynchronous context manager for one event loop.

    Texts from the server are returned without the key, even if the server repeats it.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.http = open_client(endpoint.url, endpoint.key)
        self._timeout = httpx.Timeout(endpoint.timeout_s, connect=_CONNECT_TIMEOUT_S)
        self._not_before_s = 0.0  # monotonic clock: the server asked all requests to wait until then
        self._printed_s = -_PRINT_EVERY_S

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.http.aclose()

    async def post(
        self, path: str, body: Mapping[str, Any], parse: Callable[[Any], Answer], form: str = "completion"
    ) -> Answer:
        """What `parse` makes of the JSON of the answer; it raises ValueError, KeyError or TypeError for another form.

        Raises `RequestRefusedError` if the server will not answer this request, and `UserError` if it answers none:
        at once for a wrong key, model or address, after `tries` attempts for failures that may pass, an answer of
        another form among them.
        """
        for tries in range(1, self.endpoint.tries + 1):
            await asyncio.sleep(max(0.0, self._not_before_s - time.monotonic()))
            try:
                return await self._post(path, body, parse, form)
            except _TransientError as failure:
                reason = failure.reason
                if tries == self.endpoint.tries:
                    break
                self._say(path, reason)
                await self._wait(path, failure, tries)
        raise UserError(
            f"the {self.endpoint.name} does not answer",
            found=f"{reason} (the last of {self.endpoint.tries} tries)",
            where=self.endpoint.url + path,
            advice=f"{self.endpoint.kept}: run the same command again when it answers",
        )

    async def _wait(self, path: str, failure: _TransientError, tries: int) -> None:
        if failure.wait_s is None:
            # random, so that requests that failed together are not repeated together
            delay_s = min(self.endpoint.retry_delay_s * 2.0 ** (tries - 1), _LONGEST_DELAY_S)
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
            return
        if failure.wait_s > _LONGEST_RETRY_AFTER_S:
            raise UserError(
                f"the {self.endpoint.name} asks to wait {failure.wait_s:.0f} s",
                found=failure.reason,
                expected=f"at most {_LONGEST_RETRY_AFTER_S:.0f} s",
                where=self.endpoint.url + path,
                advice=f"{self.endpoint.kept}: run the same command after that time",
            )
        self._not_before_s = max(self._not_before_s, time.monotonic() + failure.wait_s)

    async def _post(self, path: str, body: Mapping[str, Any], parse: Callable[[Any], Answer], form: str) -> Answer:
        try:
            # in all: a server that sends a byte now and then never ends a read
            async with asyncio.timeout(self.endpoint.timeout_s + _CONNECT_TIMEOUT_S):
                response = await self.http.post(self.endpoint.url + path, json=body, timeout=self._timeout)
        except TimeoutError:
            raise _TransientError(f"no whole answer in {self.endpoint.timeout_s:g} s") from None
        except httpx.RequestError as error:
            raise _TransientError(self.clean(cause_of(error))) from None
        status = response.status_code
        if status == 200:
            try:
                return parse(response.json())
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise _TransientError(
                    f"the response is not a {form} ({type(error).__name__}): {shortened(self.clean(response.text))}"
                ) from None
        reason = f"HTTP {status}: {shortened(self.clean(message_of(response)))}"
        if status in _TRANSIENT or status >= 500:
            raise _TransientError(reason, _retry_after_s(response.headers.get("retry-after")))
        if status in _REFUSALS:
            raise RequestRefusedError(reason)
        raise self._permanent(self.endpoint.url + path, status, reason)

    def _permanent(self, where: str, status: int, reason: str) -> UserError:
        endpoint = self.endpoint
        if status in (401, 403):
            return UserError(
                f"the {endpoint.name} does not accept the key",
                found=f"{reason}; {endpoint.key_variable} is {'set' if endpoint.key else 'not set'}",
                where=where,
                advice=f"Set {endpoint.key_variable} to a key of the endpoint",
            )
        if status == 404:
            what = f"there is no {endpoint.name} at this address"
            return UserError(what, found=reason, where=where, advice=endpoint.missing)
        if 300 <= status < 400:
            what = f"the {endpoint.name} redirects"
            return UserError(what, found=reason, where=where, advice="Give the final address")
        what = f"the {endpoint.name} refuses every request"
        return UserError(what, found=reason, where=where, advice="Check its documentation")

    def clean(self, text: str) -> str:
        """`text` without the key, and without lone surrogates, which UTF-8 cannot encode."""
        text = text.replace(self.endpoint.key, "***") if self.endpoint.key else text
        return text.encode("utf-8", "replace").decode()

    def _say(self, path: str, reason: str) -> None:
        if time.monotonic() - self._printed_s >= _PRINT_EVERY_S:
            self._printed_s = time.monotonic()
            say(f"{self.endpoint.url}{path} does not answer ({reason}); trying again")


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
