"""Thinking in responses: what a model writes between `<think>` and `</think>` before its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

OPEN, CLOSE = "<think>", "</think>"


def without_thinking(text: str) -> str:
    """The answer in `text`: what follows the last `</think>`, and nothing of a thought that does not end.

    Text without thinking is returned unchanged. A template may write `<think>` itself, so that a response has the end
    alone.
    """
    answer = text.rpartition(CLOSE)[2]
    begins = answer.find(OPEN)
    if begins >= 0:
        return answer[:begins].rstrip()
    return answer if answer == text else answer.lstrip()


def has_thinking(text: str) -> bool:
    """Whether a response has thinking, complete or not."""
    return OPEN in text or CLOSE in text


def opens_thinking(prompt: str) -> bool:
    """Whether a prompt ends with a thought that the response has to finish."""
    return prompt.rstrip().endswith(OPEN)


def count_thinking(ids: Sequence[int], decode: Callable[[list[int]], str]) -> int | None:
    """Tokens at the beginning of a response that are thinking, with the white space behind it.

    None for a thought that does not end.
    """
    tokens = list(ids)
    text = decode(tokens)
    if CLOSE not in text:
        return None if OPEN in text else 0
    low, high = 1, len(tokens)  # the shortest beginning that has the end of the thought
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if CLOSE in decode(tokens[:middle]) else (middle + 1, high)
    # a token of white space decodes to nothing else; the end token decodes to nothing at all, and stays
    while low < len(tokens) and decode(tokens[low : low + 1]).isspace():
        low += 1
    return low
