"""How a process of dpkd ends: exit codes, the one line of an error, the file of a traceback."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, cast

from dpkd.core.errors import StoppedError, UserError
from dpkd.core.progress import say

EXIT_INTERNAL_ERROR = 1
EXIT_INVALID = 2
#: not all of it: some rows failed, an alarm stopped training, or a budget was spent
EXIT_PARTLY = 3
EXIT_INTERRUPTED = 130
_LONGEST_NAME = 200  # characters of a path in a message


class Terminated(KeyboardInterrupt):
    """SIGTERM, or SIGHUP of a closed terminal; Ctrl-C also reaches every child process, SIGTERM does not."""


class StepFailed(Exception):
    """A step of a recipe ended with exit code `status` and has printed why."""

    def __init__(self, status: int) -> None:
        super().__init__(f"a step ended with exit code {status}")
        self.status = status


def run_process(main: Callable[[], int], command: str) -> int:
    """Call `main`; its exit code, or that of the exception it raises, which is printed as one line.

    The file of a traceback begins with `command`.
    """
    _open_standard_streams()
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, _interrupt)
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
    except OSError as error:
        if isinstance(sys.stdout, io.TextIOBase):
            _drop_output()
        name = error.filename or error.filename2
        where = "" if name is None else f" (in {str(name)[:_LONGEST_NAME]})"
        reason = error.strerror or " ".join(str(error).split())[:300] or type(error).__name__
        say(f"error: the system refused a read or write: {reason}{where}. Check the path, its permissions and the disk")
        return EXIT_INVALID
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        say(f"internal error: {type(error).__name__}: {reason}. The traceback is in {_log_traceback(command)}")
        return EXIT_INTERNAL_ERROR


def _open_standard_streams() -> None:
    """Make the standard streams safe to write to, and their numbers safe to open files beside.

    A closed stream would give its number to the next file that is opened, and a library's warning would go into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names and texts are Unicode; the terminal may not be
    sys.stderr = cast("TextIO", _Tolerant(sys.stderr))


class _Tolerant:
    """A stream for messages: work continues when it cannot be written to."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _drop_output() -> None:
    """After an error: output that cannot be written must not become a second error when the process ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt(number: int, frame: object) -> None:
    """End like Ctrl-C when a cluster pre-empts the job, or its terminal closes."""
    raise Terminated


def _log_traceback(command: str) -> Path:
    handle, name = tempfile.mkstemp(prefix=f"dpkd-{time.strftime('%Y%m%d-%H%M%S')}-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(f"command: {command}\n\n{traceback.format_exc()}")
    return Path(name)
