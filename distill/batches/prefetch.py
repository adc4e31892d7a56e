"""Batches made ahead of the step that needs them, on a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
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
    thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
    ready: deque[Future[_T]] = deque(thread.submit(make, step) for step in steps[:depth])
    try:
        for number in range(len(steps)):
            ready.extend(thread.submit(make, step) for step in steps[number + depth :][:1])
            batch = ready.popleft()
            while not wait([batch], _POLL_S).done:
                if should_stop():
                    return
            yield batch.result()
    finally:
        on_close()
        thread.shutdown(cancel_futures=True)
