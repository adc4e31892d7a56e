"""Scores of many answers on all cores: each different (answer, references) pair once, in this process and helpers.

Helpers are fresh interpreters that are fed lines of JSON, not forks (an engine's threads may be running) and not
`multiprocessing` children (which would run the caller's own script again). This process scores from the start, so that
the half second in which a helper starts is never lost; a helper that dies hands its work back.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence

from dpkd.evaluate.metrics import Scores, score
from dpkd.evaluate.rouge import RougeTokenizer
from dpkd.teacher_cache.progress import Progress, say

Pair = tuple[str, tuple[str, ...]]

_COMMAND = (sys.executable, "-m", "dpkd.evaluate.score_pool")
_CHUNK_PAIRS = 128
_MIN_PAIRS_A_HELPER = 5000  # fewer are scored sooner than a helper starts


def score_pairs(
    pairs: Sequence[Pair], tokenizer: RougeTokenizer, num_processes: int | None, progress: Progress
) -> list[Scores]:
    """The scores of each (prediction, references) in order; equal pairs are scored once.

    `num_processes` None is one for each core that this process may use.
    """
    different = list(dict.fromkeys(pairs))
    num_helpers = min((num_processes or num_cores()) - 1, len(different) // _MIN_PAIRS_A_HELPER)
    chunks = [different[start : start + _CHUNK_PAIRS] for start in range(0, len(different), _CHUNK_PAIRS)]
    results = _Results(len(chunks))
    helpers = [_Helper(chunks, results, tokenizer) for _ in range(num_helpers)]
    try:
        for helper in helpers:
            helper.start()
        _work_here(chunks, results, tokenizer)
    except BaseException:
        for helper in helpers:
            helper.process.kill()
        raise
    finally:
        for helper in helpers:
            helper.end()
    _work_here(chunks, results, tokenizer)  # what a helper that died gave back
    scores = dict(zip(different, (item for chunk in results.scores for item in chunk), strict=True))
    progress.advance(len(pairs))
    return [scores[pair] for pair in pairs]


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Results:
    """What is still to do, by chunk, and what has been done."""

    def __init__(self, num_chunks: int) -> None:
        self.waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(num_chunks):
            self.waiting.put(index)
        self.scores: list[list[Scores]] = [[] for _ in range(num_chunks)]

    def take(self) -> int | None:
        try:
            return self.waiting.get_nowait()
        except queue.Empty:
            return None


def _work_here(chunks: Sequence[Sequence[Pair]], results: _Results, tokenizer: RougeTokenizer) -> None:
    while (index := results.take()) is not None:
        results.scores[index] = [score(*pair, tokenizer) for pair in chunks[index]]


class _Helper(threading.Thread):
    """One fresh interpreter, and the thread that feeds it."""

    def __init__(self, chunks: Sequence[Sequence[Pair]], results: _Results, tokenizer: RougeTokenizer) -> None:
        super().__init__(daemon=True)
        self._chunks, self._results, self._tokenizer = chunks, results, tokenizer
        self._index: int | None = None
        self._ended = False
        self.process = subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self) -> None:
        results, to, back = self._results, self.process.stdin, self.process.stdout
        assert to is not None
        assert back is not None
        try:
            # its first line says that it is up: a chunk that waited for it would only be late
            if not back.readline():
                raise EOFError
            while (index := results.take()) is not None:
                self._index = index
                print(json.dumps([self._tokenizer, self._chunks[index]]), file=to, flush=True)
                results.scores[index] = [Scores(*row) for row in json.loads(back.readline())]
                self._index = None
            to.close()
        except (OSError, ValueError, EOFError, TypeError):
            if self._index is not None:
                results.waiting.put(self._index)
            if not self._ended:
                say("a scoring process ended before its time; its answers are scored in this one")

    def end(self) -> None:
        """Called when nothing waits any more: let it finish what it is at, and stop it where it is at nothing."""
        self._ended = True
        if self._index is None:
            self.process.kill()
        self.join()
        self.process.kill()
        self.process.wait()


def _serve() -> None:
    """A helper's life: lines of [tokenizer, pairs] in, lines of scores out."""
    score("words", ["words"])  # load the stemmer first
    print("ready", flush=True)
    for line in sys.stdin:
        tokenizer, pairs = json.loads(line)
        print(json.dumps([score(prediction, references, tokenizer) for prediction, references in pairs]), flush=True)


if __name__ == "__main__":
    _serve()
