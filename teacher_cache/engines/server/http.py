"""One HTTP request to one vLLM server, and what its failure means."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from dpkd.core.errors import UserError
from dpkd.core.urls import exposes_key
from dpkd.teacher_cache.engines.http import RequestRefusedError, cause_of, key_in, message_of, open_client, shortened

#: Longest wait for one answer, in seconds. Long, because a full queue is slow; health checks find a dead server.
REQUEST_TIMEOUT_S = 1800.0

KEY_VARIABLE = "VLLM_API_KEY"

_CONNECT_TIMEOUT_S = 5.0
_HEALTH_TIMEOUT_S = 10.0
_CHECK_TIMEOUT_S = 300.0  # the first request to a server may compile kernels: 25 s on two cores

_Trouble = Literal["unreachable", "broken", "busy", "failed"]


class NoAnswerError(Exception):
    """An attempt that failed, where another may succeed.

    Its kinds: `unreachable`, no connection; `broken`, the connection was closed or timed out, or the server aborted the
    request; `busy`, HTTP 429 or 503; `failed`, another HTTP 5xx.
    """

    def __init__(self, kind: _Trouble, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


@dataclass(eq=False)
class Server:
    """One server: its address without `/v1`, the longest wait for an answer, the id of its model, and its state."""

    url: str
    timeout_s: float = REQUEST_TIMEOUT_S
    model_id: str = ""
    up: bool = False
    tried: bool = False
    answers: bool = False  # the last request was answered, so a check that is running does not count as silence
    reported: bool = False  # the user has been told that it does not answer
    in_flight: int = 0
    heard_s: float = 0.0  # when it last answered, or got work while it had none (monotonic clock)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    lost: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.client = open_client(self.url, key_in(KEY_VARIABLE))

    async def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> bytes:
        """The body of the answer, if its status is 200; `body` gets the name of the server's model.

        Raises `NoAnswerError`, `RequestRefusedError` (4xx) or `UserError` (the key, a redirect).
        """
        longest_s = timeout_s or (_HEALTH_TIMEOUT_S if method == "GET" else _CHECK_TIMEOUT_S)
        timeout = httpx.Timeout(min(longest_s, self.timeout_s), connect=_CONNECT_TIMEOUT_S)
        named = None if body is None else {"model": self.model_id, **body}
        try:
            response = await self.client.request(method, self.url + path, json=named, timeout=timeout)
        except httpx.RequestError as error:
            unreachable = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            raise NoAnswerError("unreachable" if unreachable else "broken", cause_of(error)) from None
        self.heard_s = time.monotonic()
        status = response.status_code
        if status == 200:
            self.answers = True
            return response.content
        reason = f"HTTP {status}: {shortened(message_of(response))}"
        if status in (401, 403):
            raise UserError(
                "the server does not accept the key",
                found=f"HTTP {status}, {KEY_VARIABLE} is {'set' if KEY_VARIABLE in os.environ else 'not set'}",
                where=self.url,
                advice=f"Set {KEY_VARIABLE} to the server's key",
            )
        if 300 <= status < 400:
            raise UserError("the server redirects", found=reason, where=self.url + path, advice="Give its own address")
        if status in (429, 503):
            raise NoAnswerError("busy", reason)
        if status >= 500:
            raise NoAnswerError("failed", reason)
        raise RequestRefusedError(reason)


def base_urls(urls: Sequence[str]) -> list[str]:
    """Addresses without `/v1` and without duplicates; raises `UserError` for one that is not an HTTP address."""
    bases = []
    for text in urls:
        try:
            url = httpx.URL(text)
        except httpx.InvalidURL as error:
            raise UserError(f"a server's address cannot be read: {error}", found=repr(text)) from None
        if url.scheme not in ("http", "https") or not url.host:
            raise UserError("a server's address is not an HTTP address", found=repr(text), expected="http://HOST:PORT")
        if url.userinfo:
            # addresses are printed and logged, so they must not contain a secret
            raise UserError(f"the address of the server {url.host} contains a password", advice=f"Set {KEY_VARIABLE}")
        if key_in(KEY_VARIABLE) and exposes_key(str(url)):
            raise UserError(
                f"the key in {KEY_VARIABLE} would be sent in plain text",
                found=f"http://{url.host}",
                expected="https://, or a server on this machine",
                advice="Put TLS in front of the server, or reach it through an SSH tunnel to localhost",
            )
        bases.append(str(url).rstrip("/").removesuffix("/v1").rstrip("/"))
    return list(dict.fromkeys(bases))
