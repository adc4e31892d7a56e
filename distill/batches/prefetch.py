"""Batches made ahead of the step that needs them, on a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from typing import TypeVar

_T = TypeVar("_T")
_POLL_S = 0.2


def prefetched(
    make: Callable[[int], _T],
    steps: range,
    depth: int = 2,
    should_stop: Callable[[], bool] = lambda: False,
    on_close: Callable[[], None] = lambda: None,
) -> Generator[_T, None, None]:
    """Yield `make(step)` for every step; a thread works `depth` steps ahead. An error of `make` is raised in its turn.

    The generator ends early when `should_stop` becomes true while it waits for a batch. When it is closed it calls
    `on_close`, which must end a running `make`.
    """
    ready: queue.Queue[_T | BaseException] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(item: _T | BaseException) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=_POLL_S)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for step in steps:
                if closed.is_set():
                    return
                put(make(step))
        except BaseException as error:  # raised again by the generator
            put(error)

    thread = threading.Thread(target=produce, name="batches", daemon=True)
    thread.start()
    try:
        for _ in steps:
            item = _get(ready, should_stop)
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        on_close()
        thread.join()


def _get(ready: queue.Queue[_T | BaseException], should_stop: Callable[[], bool]) -> _T | BaseException | None:
    while True:
        try:
            return ready.get(timeout=_POLL_S)
        except queue.Empty:
            if should_stop():
                return None
