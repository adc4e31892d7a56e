"""Speed of scoring: `rouge_score` against dpkd, on the same pairs, in one process.

    python benchmarks/scoring.py [ROWS.jsonl] [--pairs 10000] [--words 0] [--runs 3]

Pairs are answers and references drawn at random from the `output` of a file (examples/dolly by default), all different.
dpkd computes Rouge-1, -2 and -L, exact match and repetition of each; `rouge_score` computes only the three Rouge
scores, on a tenth of the pairs. `--words 190` uses only rows with 190 words or more and cuts their answers there, at
about 256 tokens. Each run of dpkd is a new process, so no stems are cached; the fastest counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from dpkd.evaluate.metrics.scores import score

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
    """Seconds for all of `pairs`, extrapolated from a tenth."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    started_s = time.perf_counter()
    for prediction, references in pairs[::10]:
        scorer.score(references[0], prediction)
    return 10 * (time.perf_counter() - started_s)


def time_here(pairs: Pairs) -> float:
    """Seconds from the first call to the last score, including the import of the stemmer."""
    started_s = time.perf_counter()
    for prediction, references in pairs:
        score(prediction, references)
    return time.perf_counter() - started_s


def time_apart(given: argparse.Namespace) -> float:
    """`time_here` in a new process."""
    arguments = (given.path, "--words", given.words, "--pairs", given.pairs, "--only-here")
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "examples" / "dolly" / "train.jsonl"
    parser.add_argument("path", nargs="?", type=Path, default=default, help="rows [examples/dolly/train.jsonl]")
    parser.add_argument("--pairs", type=int, default=10_000, help="number of pairs [10000]")
    parser.add_argument(
        "--words", type=int, default=0, help="use only rows with this many words, and cut answers there [0: no limit]"
    )
    parser.add_argument("--runs", type=int, default=3, help="runs of dpkd, of which the fastest counts [3]")
    parser.add_argument("--only-here", action="store_true", help="print the seconds of one run of dpkd")
    given = parser.parse_args()
    pairs = make_pairs(given.path, given.pairs, given.words)
    if given.only_here:
        print(time_here(pairs))
        return
    words = sum(len(prediction.split()) for prediction, _ in pairs) / len(pairs)
    print(f"{given.path.name}: {len(pairs)} pairs, {words:.0f} words per answer; load {os.getloadavg()[0]:.1f} before")
    library_s, here_s = time_library(pairs), min(time_apart(given) for _ in range(given.runs))
    print(f"rouge_score {library_s:.2f} s, dpkd {here_s:.2f} s: {library_s / here_s:.1f} times as fast")
    print(f"load {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
