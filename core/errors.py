"""The one error that a person is meant to read: what is wrong, the two values, where, what to do next."""

from __future__ import annotations


class UserError(Exception):
    """Something asked for or handed in that cannot be used; the command line prints it and exits with 2.

    Args:
        what: what is wrong, as a statement without a full stop.
        found: the value that was met.
        expected: the value that was needed.
        where: file, line, key or row.
        advice: what to do next.
    """

    def __init__(
        self,
        what: str,
        *,
        found: object = None,
        expected: object = None,
        where: object = None,
        advice: str | None = None,
    ) -> None:
        values = [f"{name} {value}" for name, value in (("found", found), ("expected", expected)) if value is not None]
        message = what
        if values:
            message += f": {', '.join(values)}"
        if where is not None:
            message += f" (in {where})"
        if advice:
            message += f". {advice}"
        super().__init__(" ".join(message.split()))


class StoppedError(UserError):
    """Work stopped at a limit that the user set. What is done is kept; the command line exits with 3."""


def first_line(error: BaseException) -> str:
    """What `error` says, for a message of one line; its type where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]
