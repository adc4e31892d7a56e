"""Several HTTP servers as one: places in flight, retries with back-off, and servers that go and come back."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from dpkd.core.errors import UserError
from dpkd.core.progress import say
from dpkd.teacher_cache.engines.server.http import (
    REQUEST_TIMEOUT_S,
    NoAnswerError,
    RequestRefusedError,
    Server,
    ServerHttp,
)

#: How long a job waits while no server answers, in seconds.
PATIENCE_S = 300.0

_QUIET_S = 5.0  # a server at work that says nothing for this long is asked for its health
_SILENCE_S = 30.0  # and is given up when that has no answer either for this long
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.25, 5.0
_MOST_FAILURES = 3  # tries of a request that a healthy server answers with 5xx
_MOST_BREAKS = 5  # tries of a request that loses its connection: more, as every kill of a server costs one

_Answer = TypeVar("_Answer")


@dataclass
class _Tries:
    """What one request has been through."""

    total: int = 0
    failures: int = 0
    breaks: int = 0
    busy_since_s: float | None = None


class ServerPool:
    """Sends requests to whichever server has the fewest in flight, from an event loop on a thread of its own.

    A task per server brings it into the rotation once `verify` passes, watches it, and does so again after an
    outage: what comes back at an address may be another model. A `UserError` of `verify` ends all work.
    """

    def __init__(
        self,
        urls: Sequence[str],
        max_in_flight: int,
        verify: Callable[[Server, ServerHttp], Awaitable[None]],
        *,
        patience_s: float = PATIENCE_S,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        self.servers = [Server(url) for url in urls]
        self._max_in_flight, self._verify = max_in_flight, verify
        self._patience_s, self._timeout_s = patience_s, timeout_s
        self._http = ServerHttp(timeout_s)
        self._changed = asyncio.Event()
        self._fatal: Exception | None = None
        self._last_reason = ""
        self._none_up_since_s: float | None = time.monotonic()
        self._completed_s = time.monotonic()
        self._keepers: list[asyncio.Task[None]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server-pool", daemon=True)
        self._thread.start()

    @property
    def places(self) -> int:
        """How many requests the servers that answer may have in flight together."""
        return self._max_in_flight * max(1, sum(server.up for server in self.servers))

    def open(self) -> None:
        """Return once every server was tried and one can be used; raises `UserError` when none answers in time."""
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    def submit(self, body: Mapping[str, Any], parse: Callable[[bytes], _Answer]) -> Future[_Answer]:
        """Send a completion request; `parse` gets the answer's body and may raise `NoAnswerError` to have it again.

        The future raises `RequestRefusedError` for this request's own fault, `UserError` where nothing can go on.
        """
        return asyncio.run_coroutine_threadsafe(self._answer(body, parse), self._loop)

    def close(self) -> None:
        """Abort what is in flight and end the thread."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> None:
        self._keepers = [asyncio.create_task(self._keep(server)) for server in self.servers]
        await self._until(lambda: self._none_up_since_s is None and all(server.tried for server in self.servers))

    async def _close(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.close()

    async def _answer(self, body: Mapping[str, Any], parse: Callable[[bytes], _Answer]) -> _Answer:
        """Try a request until it has an answer or the trouble is its own."""
        tries, last = _Tries(), None
        while True:
            server = await self._until(partial(self._claim, last))
            try:
                answer = parse(await self._complete(server, body))
                self._completed_s = time.monotonic()
                return answer
            except NoAnswerError as trouble:
                await self._judge(server, trouble, tries)
                elsewhere = any(other.up for other in self.servers if other is not server)
                at_once = elsewhere and trouble.kind in ("unreachable", "broken")
            finally:
                server.in_flight -= 1
                self._notify()
            last = server
            if not at_once:
                await asyncio.sleep(_back_off_s(tries.total))

    async def _complete(self, server: Server, body: Mapping[str, Any]) -> bytes:
        """One try, given up when the server is found lost meanwhile (a server that hangs keeps its connections)."""
        whole = {"model": server.model_id, **body}
        post = asyncio.ensure_future(
            self._http.ask(server, "POST", "/v1/completions", whole, timeout_s=self._timeout_s)
        )
        lost = asyncio.ensure_future(server.lost.wait())
        try:
            await asyncio.wait({post, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not post.done():
                raise NoAnswerError("broken", "the server stopped answering")
            return post.result()
        finally:
            post.cancel()
            lost.cancel()

    async def _judge(self, server: Server, trouble: NoAnswerError, tries: _Tries) -> None:
        """Is it the server or the request? Raises where another try would not help."""
        tries.total += 1
        now_s = time.monotonic()
        health = None if trouble.kind in ("unreachable", "broken") else await self._health(server)
        if trouble.kind == "unreachable" or health is not None:
            self._lose(server, trouble.reason)
        elif trouble.kind == "broken":
            tries.breaks += 1
            server.wake.set()  # its keeper asks whether it is still there
        elif trouble.kind == "failed":
            tries.failures += 1
        else:
            tries.busy_since_s = tries.busy_since_s or now_s
            if now_s - max(tries.busy_since_s, self._completed_s) > self._patience_s:
                raise self._out_of_patience(trouble.reason)
        if tries.failures >= _MOST_FAILURES or tries.breaks >= _MOST_BREAKS:
            count = tries.failures + tries.breaks
            raise RequestRefusedError(f"no answer in {count} tries: {trouble.reason}")

    def _claim(self, last: Server | None) -> Server | None:
        """A place on the server with the fewest in flight, on another than `last` where there is one."""
        free = [server for server in self.servers if server.up and server.in_flight < self._max_in_flight]
        if not free:
            return None
        # a server that fails fast has few in flight and would draw every second try
        server = min(free, key=lambda server: (server is last, server.in_flight))
        if server.in_flight == 0:
            server.heard_s = time.monotonic()
        server.in_flight += 1
        return server

    async def _until(self, ready: Callable[[], Any]) -> Any:
        """What `ready` returns once that is true. Raises when the work must end or patience does."""
        started_s = time.monotonic()
        while True:
            if self._fatal is not None:
                raise self._fatal
            if found := ready():
                return found
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

    async def _keep(self, server: Server) -> None:
        try:
            while True:
                await self._bring_up(server)
                await self._watch(server)
        except Exception as error:
            self._fatal = error  # raised to whoever waits; a keeper that died in silence would leave them waiting
            self._notify()

    async def _bring_up(self, server: Server) -> None:
        for tries in itertools.count(1):
            server.answers = False
            try:
                await self._verify(server, self._http)
                break
            except NoAnswerError as trouble:
                self._lose(server, trouble.reason)
            await asyncio.sleep(_back_off_s(tries))
        if server.told:
            say(f"{server.url} answers again")
        server.up, server.tried, server.told = True, True, False
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
            trouble = await self._health(server)
            if trouble is not None and (trouble.kind != "broken" or quiet_s >= _SILENCE_S):
                self._lose(server, trouble.reason)

    async def _health(self, server: Server) -> NoAnswerError | None:
        """None when the server says that it is well."""
        try:
            await self._http.ask(server, "GET", "/health")
        except NoAnswerError as trouble:
            return trouble
        except RequestRefusedError:
            return None  # a gateway without the path: something answers
        return None

    def _lose(self, server: Server, reason: str) -> None:
        """Take a server out of the rotation and say so, once per outage."""
        server.up, server.tried, server.answers = False, True, False
        server.lost.set()
        server.wake.set()
        self._last_reason = reason
        others = any(other.up for other in self.servers)
        if not others and self._none_up_since_s is None:
            self._none_up_since_s = time.monotonic()
        if not server.told:
            server.told = True
            then = "its requests go to the others" if others else f"waiting for it, up to {self._patience_s:.0f} s"
            say(f"{server.url} does not answer ({reason}); {then}")
        self._notify()

    def _out_of_patience(self, reason: str) -> UserError:
        return UserError(
            f"no server has answered for {self._patience_s:.0f} s",
            found=reason or None,
            where=", ".join(server.url for server in self.servers),
            advice="Committed shards are kept: start the servers, and the same command goes on",
        )


def _back_off_s(tries: int) -> float:
    """Exponential, and drawn from the upper half so that requests that failed together do not return together."""
    return min(_FIRST_DELAY_S * 2.0**tries, _LONGEST_DELAY_S) * random.uniform(0.5, 1.0)
