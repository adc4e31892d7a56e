"""How a process of dpkd ends: exit codes, the one line of an error, the file of a traceback."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from dpkd.core.errors import StoppedError, UserError
from dpkd.core.progress import say

EXIT_INTERNAL_ERROR = 1
EXIT_INVALID = 2
#: not all of it: some rows failed, an alarm stopped training, or a budget was spent
EXIT_PARTLY = 3
EXIT_INTERRUPTED = 130


class Terminated(KeyboardInterrupt):
    """SIGTERM; Ctrl-C in a terminal also reaches every child process, SIGTERM does not."""


class StepFailed(Exception):
    """A step of a recipe ended with exit code `status` and has printed why."""

    def __init__(self, status: int) -> None:
        super().__init__(f"a step ended with exit code {status}")
        self.status = status


def run_process(main: Callable[[], int], command: str) -> int:
    """Call `main`; its exit code, or that of the exception it raises, which is printed as one line.

    The file of a traceback begins with `command`.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return main()
    except StoppedError as stop:
        say(f"stopped: {stop}")
        return EXIT_PARTLY
    except UserError as error:
        say(f"error: {error}")
        return EXIT_INVALID
    except StepFailed as error:
        return error.status
    except KeyboardInterrupt:
        say("interrupted: finished work is kept; run the same command again to resume")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # whatever read our output has ended, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        say(f"internal error: {type(error).__name__}: {reason}. The traceback is in {_log_traceback(command)}")
        return EXIT_INTERNAL_ERROR


def _interrupt(number: int, frame: object) -> None:
    """End like Ctrl-C when a cluster pre-empts the job."""
    raise Terminated


def _log_traceback(command: str) -> Path:
    handle, name = tempfile.mkstemp(prefix=f"dpkd-{time.strftime('%Y%m%d-%H%M%S')}-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(f"command: {command}\n\n{traceback.format_exc()}")
    return Path(name)
