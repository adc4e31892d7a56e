"""Scoring: `rouge_score`, this package in one process, and on all cores, over the same pairs in turn.

    python benchmarks/scoring.py [ROWS.jsonl] [--pairs 10000]

Pairs are answers and references drawn at random from a file's `output` (the shipped excerpt of Dolly by default), all
different, with Rouge-1, -2, -L, exact match and repetition of each. `rouge_score` computes the three Rouge scores
alone, on one pair in ten, and its time is multiplied; the others are the best of three runs with a cold cache of stems.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

from dpkd.evaluate.score_pool import num_cores, score_pairs
from dpkd.teacher_cache.progress import Progress


def make_pairs(path: Path, count: int) -> list[tuple[str, tuple[str, ...]]]:
    texts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        output = json.loads(line)["output"]
        texts.append(output if isinstance(output, str) else output[0])
    generator = random.Random(0)
    return [(f"{generator.choice(texts)} {i}", (generator.choice(texts),)) for i in range(count)]


def time_library(pairs: list[tuple[str, tuple[str, ...]]]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    started_s = time.perf_counter()
    for prediction, references in pairs[::10]:
        scorer.score(references[0], prediction)
    return 10 * (time.perf_counter() - started_s)


def time_ours(path: Path, count: int, num_processes: int) -> float:
    """In a process of its own, so that no stem is known."""
    command = [sys.executable, __file__, str(path), "--pairs", str(count), "--arm", str(num_processes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    default = Path(__file__).resolve().parents[1] / "examples" / "dolly" / "train.jsonl"
    parser.add_argument("path", nargs="?", type=Path, default=default)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--arm", type=int, help="measure this many processes and print seconds alone")
    given = parser.parse_args()
    pairs = make_pairs(given.path, given.pairs)
    if given.arm:
        score_pairs(pairs[:1], "default", 1, Progress("warm", None, "pairs"))  # imports are not scoring
        started_s = time.perf_counter()
        score_pairs(pairs, "default", given.arm, Progress("scoring", None, "pairs"))
        print(time.perf_counter() - started_s)
        return
    library_s = time_library(pairs)
    print(f"{given.pairs} pairs, {num_cores()} cores")
    print(f"rouge_score, one process: {library_s:.2f} s")
    times: dict[int, list[float]] = {1: [], num_cores(): []}
    for _ in range(3):
        for num_processes, found in times.items():
            found.append(time_ours(given.path, given.pairs, num_processes))
    for num_processes, found in times.items():
        print(
            f"dpkd, {num_processes} process(es): {min(found):.2f} s, {library_s / min(found):.1f} times rouge_score, "
            f"{min(times[1]) / min(found):.2f} times one process"
        )


if __name__ == "__main__":
    main()
