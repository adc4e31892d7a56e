"""Scores of many answers on all cores: each different (answer, references) pair once, in this process and helpers.

Helpers are fresh interpreters that are fed lines of JSON, not forks (an engine's threads may be running) and not
`multiprocessing` children (which would run the caller's own script again). This process scores from the start, so that
the tenth of a second in which a helper starts is not lost; a helper that dies hands its work back.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence

from dpkd.core.progress import Progress, say
from dpkd.evaluate.metrics.exact_match import Scores, score
from dpkd.evaluate.metrics.rouge import RougeTokenizer

Pair = tuple[str, tuple[str, ...]]

_COMMAND = (sys.executable, "-m", "dpkd.evaluate.answers.score_worker")
# texts of a chunk: large at first, as to hand one over takes this process, which scores too, some milliseconds; small
# in the end, so that all processes end at about the same time
_LARGEST_CHUNK, _SMALLEST_CHUNK = 200_000, 20_000  # characters; about 50 and 5 ms of work
_CHUNKS_AHEAD = 2
_MIN_CHARACTERS_A_HELPER = 1_500_000  # fewer are scored in about the time that a helper costs


def score_pairs(
    pairs: Sequence[Pair], tokenizer: RougeTokenizer, num_processes: int | None, progress: Progress
) -> list[Scores]:
    """The scores of each (prediction, references) in order; equal pairs are scored once.

    `num_processes` None is one for each core that this process may use.
    """
    # answers to one example stand together: one process then cuts its references into stems, once
    different = sorted(dict.fromkeys(pairs), key=lambda pair: pair[1])
    sizes = [len(prediction) + sum(map(len, references)) for prediction, references in different]
    num_helpers = min((num_processes or num_cores()) - 1, sum(sizes) // _MIN_CHARACTERS_A_HELPER)
    chunks = _chunks(different, sizes, 1 + num_helpers)
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


def _chunks(pairs: Sequence[Pair], sizes: Sequence[int], num_processes: int) -> list[list[Pair]]:
    """`pairs` in their order, in chunks of an eighth of each process's share of what is left."""
    chunks: list[list[Pair]] = []
    left, room = sum(sizes), 0
    for pair, size in zip(pairs, sizes, strict=True):
        if room <= 0:
            chunks.append([])
            room = max(_SMALLEST_CHUNK, min(_LARGEST_CHUNK, left // (8 * num_processes)))
        chunks[-1].append(pair)
        room -= size
        left -= size
    return chunks


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
    """One fresh interpreter, and the thread that feeds it: `_under_way` are the chunks that it has and owes."""

    def __init__(self, chunks: Sequence[Sequence[Pair]], results: _Results, tokenizer: RougeTokenizer) -> None:
        super().__init__(daemon=True)
        self._chunks, self._results, self._tokenizer = chunks, results, tokenizer
        self._under_way: deque[int] = deque()
        self._ended = False
        self.process = subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self) -> None:
        to, back = self.process.stdin, self.process.stdout
        assert to is not None
        assert back is not None
        try:
            # its first line says that it is up: a chunk that waited for it would only be late
            if not back.readline():
                raise EOFError
            while True:
                while len(self._under_way) < _CHUNKS_AHEAD and (index := self._results.take()) is not None:
                    self._under_way.append(index)
                    print(json.dumps([self._tokenizer, self._chunks[index]]), file=to, flush=True)
                if not self._under_way:
                    break
                rows = json.loads(back.readline())
                self._results.scores[self._under_way[0]] = [Scores(*row) for row in rows]
                self._under_way.popleft()
            to.close()
        except (OSError, ValueError, EOFError, TypeError):
            for index in self._under_way:
                self._results.waiting.put(index)
            if not self._ended:
                say("a scoring process ended before its time; its answers are scored in this one")

    def end(self) -> None:
        """Called when nothing waits any more: let it finish what it is at, and stop it where it is at nothing."""
        self._ended = True
        if not self._under_way:
            self.process.kill()
        self.join()
        self.process.kill()
        self.process.wait()
