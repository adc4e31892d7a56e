"""Interrupts that let the step in hand end first."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any, Self

from dpkd.core.progress import say

#: a launcher repeats the Ctrl-C that the terminal has sent to every process already: both are one request
_ONE_REQUEST_S = 1.0


class Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP end the step first: `should_stop` turns true.

    A second one, a second later, interrupts; but not a SIGHUP, of which a lost terminal may send several: the shell's
    and the kernel's. `quiet` says nothing, as for all ranks but the main one.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.should_stop = False
        self._quiet = quiet
        self._asked_s = 0.0
        self._before: dict[int, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.should_stop:
            if number == signal.SIGHUP or time.monotonic() - self._asked_s < _ONE_REQUEST_S:
                return
            raise KeyboardInterrupt
        self.should_stop, self._asked_s = True, time.monotonic()
        if not self._quiet:
            say("interrupted: finishing this step and writing a checkpoint")

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
                numbers.append(signal.SIGHUP)
            self._before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
