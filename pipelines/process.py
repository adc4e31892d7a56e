"""How a process of dpkd ends: 0 success, 2 a mistake that can be mended, 1 our own fault, 130 interrupted.

3 is success with rows set aside: what was asked for is there, but for rows that the engine could not answer.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.progress import say

EXIT_USER_ERROR = 2
EXIT_OWN_FAULT = 1
EXIT_SET_ASIDE = 3
EXIT_INTERRUPTED = 130
_INTERRUPTED = "interrupted: what is finished is kept; run the same command again to go on"


class Terminated(KeyboardInterrupt):
    """SIGTERM, as against a Ctrl-C that the terminal also sends to every child."""


class StepFailed(Exception):
    """A process started by this one ended with `status`; what it said stands above."""

    def __init__(self, status: int) -> None:
        super().__init__(f"a step ended with status {status}")
        self.status = status


def run_process(main: Callable[[], Any]) -> int:
    """Run `main` and turn what it returns or raises into an exit status and one line on standard error."""
    _terminate_like_interrupt()
    try:
        status = main()
        if status == EXIT_INTERRUPTED:  # typer turns an interrupt into an exit that it returns
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except UserError as error:
        say(f"error: {error}")
        return EXIT_USER_ERROR
    except StepFailed as error:
        return error.status  # the step has said why
    except KeyboardInterrupt:
        say(_INTERRUPTED)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the reader of our output went away (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # older typer hands an interrupt on as its Abort
            say(_INTERRUPTED)
            return EXIT_INTERRUPTED
        if type(error).__name__ == "NoArgsIsHelpError":
            say(str(error))
            return EXIT_USER_ERROR
        if hasattr(error, "format_message"):  # typer's usage errors, whichever click it brings along
            say(f"error: {' '.join(error.format_message().split())}")
            return EXIT_USER_ERROR
        reason = " ".join(str(error).split())[:300]
        say(f"dpkd failed: {type(error).__name__}: {reason}; the traceback is in {_log_traceback()}")
        return EXIT_OWN_FAULT


def _terminate_like_interrupt() -> None:
    """SIGTERM, a cluster's pre-emption, ends a process as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, interrupt)


def _log_traceback() -> Path:
    handle, name = tempfile.mkstemp(prefix=f"dpkd-{time.strftime('%Y%m%d-%H%M%S')}-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(f"command: {sys.argv}\n\n{traceback.format_exc()}")
    return Path(name)
