"""Scoring: `rouge_score`, this package in one process, and on all cores, over the same pairs in turn.

    python benchmarks/scoring.py [ROWS.jsonl] [--pairs 10000 50000 100000] [--words 0] [--runs 3]

Pairs are answers and references drawn at random from a file's `output` (the shipped excerpt of Dolly by default), all
different, with Rouge-1, -2, -L, exact match and repetition of each; `--words 190` takes rows of so many words and more
alone, and cuts their answers there: about 256 tokens. `rouge_score` computes the three Rouge scores alone, on a tenth
of the first number of pairs, and its time is multiplied. The others are the best of some runs, in turn, each in a
process of its own, so that no stem is known: seconds from the call to the last score, starting the helpers included,
and processor time of all processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

from dpkd.core.progress import Progress
from dpkd.evaluate.answers.score_pool import num_cores, score_pairs

Pairs = list[tuple[str, tuple[str, ...]]]


def make_pairs(path: Path, count: int, num_words: int = 0) -> Pairs:
    texts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        output = json.loads(line)["output"]
        text = output if isinstance(output, str) else output[0]
        if len(text.split()) >= num_words:
            texts.append(text)
    answers = [" ".join(text.split()[:num_words]) if num_words else text for text in texts]
    generator = random.Random(0)
    return [(f"{generator.choice(answers)} {i}", (generator.choice(texts),)) for i in range(count)]


def time_library(pairs: Pairs) -> float:
    """Seconds that all of `pairs` would take."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    started_s = time.perf_counter()
    for prediction, references in pairs[::10]:
        scorer.score(references[0], prediction)
    return 10 * (time.perf_counter() - started_s)


def processor_s() -> float:
    """Processor time of this process and of its helpers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(item.ru_utime + item.ru_stime for item in used)


def time_here(pairs: Pairs, num_processes: int) -> tuple[float, float]:
    """Wall and processor seconds of scoring `pairs` in this process and its helpers."""
    wall_s, cpu_s = time.perf_counter(), processor_s()
    score_pairs(pairs, "default", num_processes, Progress("scoring", None, "pairs"))
    return time.perf_counter() - wall_s, processor_s() - cpu_s


def time_apart(given: argparse.Namespace, count: int, num_processes: int) -> tuple[float, float]:
    """`time_here` in a process of its own."""
    arguments = (given.path, "--words", given.words, "--pairs", count, "--arm", num_processes)
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    wall_s, cpu_s = json.loads(done.stdout.splitlines()[-1])
    return wall_s, cpu_s


def main() -> None:
    parser = argparse.ArgumentParser()
    default = Path(__file__).resolve().parents[1] / "examples" / "dolly" / "train.jsonl"
    parser.add_argument("path", nargs="?", type=Path, default=default)
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000])
    parser.add_argument("--words", type=int, default=0, help="rows of so many words alone, answers cut there")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--arm", type=int, help="measure this many processes and print seconds alone")
    given = parser.parse_args()
    if given.arm:
        print(json.dumps(time_here(make_pairs(given.path, given.pairs[0], given.words), given.arm)))
        return
    first = make_pairs(given.path, given.pairs[0], given.words)
    words = sum(len(prediction.split()) for prediction, _ in first) / len(first)
    print(f"{given.path.name}: {words:.0f} words an answer; {num_cores()} cores, load {os.getloadavg()[0]:.1f} before")
    library_s = time_library(first) / len(first)
    print(f"rouge_score, one process: {1e3 * library_s:.2f} ms a pair")
    for count in given.pairs:
        found: dict[int, list[tuple[float, float]]] = {1: [], num_cores(): []}
        for _ in range(given.runs):
            for num_processes, times in found.items():
                times.append(time_apart(given, count, num_processes))
        alone_s = min(found[1])[0]
        for num_processes, times in found.items():
            wall_s, cpu_s = min(times)
            print(
                f"{count} pairs, {num_processes} process(es): {wall_s:.2f} s, processor {cpu_s:.2f} s; "
                f"{count * library_s / wall_s:.1f} times rouge_score, {alone_s / wall_s:.2f} times one process"
            )
    print(f"load {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
