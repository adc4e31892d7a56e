"""Several HTTP servers as one: load balancing, retries with back-off, and servers that stop and come back."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from dpkd.core.errors import UserError
from dpkd.core.progress import say
from dpkd.teacher_cache.engines.http import LoopThread, RequestRefusedError
from dpkd.teacher_cache.engines.server.http import REQUEST_TIMEOUT_S, NoAnswerError, Server

#: How long a job waits while no server answers, in seconds.
PATIENCE_S = 300.0

_QUIET_S = 5.0  # a busy server that has not answered for this long gets a health check
_SILENCE_S = 30.0  # one that has not answered the health check for this long is lost
_FIRST_DELAY_S, _MAX_DELAY_S = 0.25, 5.0
_MAX_FAILURES = 3  # attempts of a request that a healthy server answers with 5xx
_MAX_BREAKS = 5  # attempts of a request that loses its connection: more, because each kill of a server costs one

_Answer = TypeVar("_Answer")


@dataclass
class _Attempts:
    """The attempts of one request so far."""

    total: int = 0
    failures: int = 0
    breaks: int = 0
    busy_since_s: float | None = None


class ServerPool:
    """Sends each request to the server with the fewest in flight, from an event loop on its own thread.

    A task per server adds it once `verify` passes and watches it. After an outage the server is verified again, because
    another model may come back at the same address. A `UserError` from `verify` ends all work.
    """

    def __init__(
        self,
        urls: Sequence[str],
        max_in_flight: int,
        verify: Callable[[Server], Awaitable[None]],
        *,
        patience_s: float = PATIENCE_S,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        self.servers = [Server(url, timeout_s) for url in urls]
        self._max_in_flight, self._verify, self._patience_s = max_in_flight, verify, patience_s
        self._changed = asyncio.Event()
        self._fatal: Exception | None = None
        self._last_reason = ""
        self._none_up_since_s: float | None = time.monotonic()
        self._completed_s = time.monotonic()
        self._loop = LoopThread("server-pool")

    @property
    def capacity(self) -> int:
        """How many requests may be in flight on all servers that answer."""
        return self._max_in_flight * max(1, sum(server.up for server in self.servers))

    def open(self) -> None:
        """Return once every server has been tried and one can be used; raises `UserError` if none answers in time."""
        self._watchers = [self._loop.start(self._look_after(server)) for server in self.servers]
        tried = self._until(lambda: self._none_up_since_s is None and all(server.tried for server in self.servers))
        self._loop.start(tried).result()

    def submit(self, body: Mapping[str, Any], parse: Callable[[bytes], _Answer]) -> Future[_Answer]:
        """Send a completion request; `parse` gets the answer's body and may raise `NoAnswerError` to try again.

        The future raises `RequestRefusedError` if only this request failed, `UserError` if no request can succeed.
        """
        return self._loop.start(self._answer(body, parse))

    def close(self) -> None:
        """Abort the requests in flight and end the thread."""
        self._loop.close(*(server.client for server in self.servers))

    async def _answer(self, body: Mapping[str, Any], parse: Callable[[bytes], _Answer]) -> _Answer:
        """Try a request until it is answered, or is itself the cause of the failures."""
        attempts, last = _Attempts(), None
        while True:
            server = await self._until(partial(self._claim, last))
            try:
                answer = parse(await self._complete(server, body))
                self._completed_s = time.monotonic()
                return answer
            except NoAnswerError as failure:
                await self._judge(server, failure, attempts)
                elsewhere = any(other.up for other in self.servers if other is not server)
                at_once = elsewhere and failure.kind in ("unreachable", "broken")
            finally:
                server.in_flight -= 1
                self._notify()
            last = server
            if not at_once:
                await asyncio.sleep(_back_off_s(attempts.total))

    async def _complete(self, server: Server, body: Mapping[str, Any]) -> bytes:
        """One attempt. It ends when the server is lost: a server that hangs keeps its connections open."""
        post = asyncio.ensure_future(server.ask("POST", "/v1/completions", body, timeout_s=server.timeout_s))
        lost = asyncio.ensure_future(server.lost.wait())
        try:
            await asyncio.wait({post, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not post.done():
                raise NoAnswerError("broken", "the server stopped answering")
            return post.result()
        finally:
            post.cancel()
            lost.cancel()

    async def _judge(self, server: Server, failure: NoAnswerError, attempts: _Attempts) -> None:
        """Decide whether server or request caused `failure`; raises if another attempt would not help."""
        attempts.total += 1
        now_s = time.monotonic()
        health = None if failure.kind in ("unreachable", "broken") else await self._health(server)
        if failure.kind == "unreachable" or health is not None:
            self._lose(server, failure.reason)
        elif failure.kind == "broken":
            attempts.breaks += 1
            server.wake.set()  # its watcher checks its health
        elif failure.kind == "failed":
            attempts.failures += 1
        else:
            attempts.busy_since_s = attempts.busy_since_s or now_s
            if now_s - max(attempts.busy_since_s, self._completed_s) > self._patience_s:
                raise self._out_of_patience(failure.reason)
        if attempts.failures >= _MAX_FAILURES or attempts.breaks >= _MAX_BREAKS:
            count = attempts.failures + attempts.breaks
            raise RequestRefusedError(f"no answer in {count} attempts: {failure.reason}")

    def _claim(self, last: Server | None) -> Server | None:
        """Take a place on the server with the fewest requests, if possible not `last`; None if all are full."""
        free = [server for server in self.servers if server.up and server.in_flight < self._max_in_flight]
        if not free:
            return None
        # a server that fails fast has few in flight and would get every second attempt
        server = min(free, key=lambda server: (server is last, server.in_flight))
        if server.in_flight == 0:
            server.heard_s = time.monotonic()
        server.in_flight += 1
        return server

    async def _until(self, ready: Callable[[], Any]) -> Any:
        """The result of `ready` once it is true. Raises if the work must end, or if no server answers for too long."""
        started_s = time.monotonic()
        while True:
            if self._fatal is not None:
                raise self._fatal
            if result := ready():
                return result
            if self._none_up_since_s is not None and not any(server.answers for server in self.servers):
                waited_s = time.monotonic() - max(started_s, self._none_up_since_s)
                if waited_s > self._patience_s:
                    raise self._out_of_patience(self._last_reason)
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _look_after(self, server: Server) -> None:
        try:
            while True:
                await self._bring_up(server)
                await self._watch(server)
        except Exception as error:
            self._fatal = error  # raised in everything that waits
            self._notify()

    async def _bring_up(self, server: Server) -> None:
        for tries in itertools.count(1):
            server.answers = False
            try:
                await self._verify(server)
                break
            except NoAnswerError as failure:
                self._lose(server, failure.reason)
            await asyncio.sleep(_back_off_s(tries))
        if server.reported:
            say(f"{server.url} answers again")
        server.up, server.tried, server.reported = True, True, False
        server.heard_s = time.monotonic()
        server.lost.clear()
        server.wake.clear()
        self._none_up_since_s = None
        self._notify()

    async def _watch(self, server: Server) -> None:
        """Return once the server is lost."""
        while server.up:
            with suppress(TimeoutError):
                async with asyncio.timeout(_QUIET_S):
                    await server.wake.wait()
            quiet_s = time.monotonic() - server.heard_s
            suspect = server.wake.is_set() or (server.in_flight and quiet_s >= _QUIET_S)
            server.wake.clear()
            if not server.up or not suspect:
                continue
            failure = await self._health(server)
            if failure is not None and (failure.kind != "broken" or quiet_s >= _SILENCE_S):
                self._lose(server, failure.reason)

    async def _health(self, server: Server) -> NoAnswerError | None:
        """None if the server is healthy, else why not."""
        try:
            await server.ask("GET", "/health")
        except NoAnswerError as failure:
            return failure
        except RequestRefusedError:
            return None  # a gateway without this path, but it answers
        return None

    def _lose(self, server: Server, reason: str) -> None:
        """Stop using a server, and tell the user once per outage."""
        server.up, server.tried, server.answers = False, True, False
        server.lost.set()
        server.wake.set()
        self._last_reason = reason
        others = any(other.up for other in self.servers)
        if not others and self._none_up_since_s is None:
            self._none_up_since_s = time.monotonic()
        if not server.reported:
            server.reported = True
            then = "its requests go to the others" if others else f"waiting for it, up to {self._patience_s:.0f} s"
            say(f"{server.url} does not answer ({reason}); {then}")
        self._notify()

    def _out_of_patience(self, reason: str) -> UserError:
        return UserError(
            f"no server has answered for {self._patience_s:.0f} s",
            found=reason or None,
            where=", ".join(server.url for server in self.servers),
            advice="Committed shards are kept. Start the servers and run the same command again: it resumes",
        )


def _back_off_s(tries: int) -> float:
    """Seconds to wait: exponential, and random so that requests that failed together do not return together."""
    return min(_FIRST_DELAY_S * 2.0**tries, _MAX_DELAY_S) * random.uniform(0.5, 1.0)
