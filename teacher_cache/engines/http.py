"""What everything that speaks HTTP here shares: keys, connections, error texts, and an event loop on a thread."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx

from dpkd.core.errors import UserError
from dpkd.core.urls import is_loopback

_Result = TypeVar("_Result")


class RequestRefusedError(Exception):
    """A server refused a request, and would again; the text is one line for the user."""


def key_in(variable: str) -> str:
    """The key in an environment variable, without white space around it, or an empty text.

    Raises `UserError` for one that cannot be sent: httpx would refuse it with an error that shows the key.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the key in {variable} has invalid characters", expected="printable ASCII", where=variable)
    return key


def open_client(url: str, key: str) -> httpx.AsyncClient:
    """Connections to the server at `url`: no redirects, which could take the key elsewhere, and no proxy to ourselves.

    vLLM closes idle connections after 5 s: ours close before, so that none is closed during a request.
    """
    return httpx.AsyncClient(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        follow_redirects=False,
        trust_env=not is_loopback(httpx.URL(url).host),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0),
    )


def cause_of(error: httpx.RequestError) -> str:
    """Why a request got no answer, in one line."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def message_of(response: httpx.Response) -> str:
    """The server's error message, or else the beginning of its answer."""
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return response.text


def shortened(text: str) -> str:
    """`text` in one short line."""
    return " ".join(text.split())[:200]


class LoopThread:
    """An event loop on its own thread, for work that other threads start and wait for."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, _Result]) -> Future[_Result]:
        """Run `work` in the loop; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self, *clients: httpx.AsyncClient) -> bool:
        """Cancel all work, close `clients` and end the thread; returns whether it had not ended before."""

        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for client in clients:
                await client.aclose()

        if self._loop.is_closed():
            return False
        self.start(end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        return True
