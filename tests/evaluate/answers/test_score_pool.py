"""Scoring on several cores: the same scores in the same order, each pair once, and a helper that dies loses nothing."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import pairwise

import pytest

from dpkd.core.progress import Progress
from dpkd.evaluate.answers import score_pool
from dpkd.evaluate.answers.score_pool import Pair, score_pairs
from dpkd.evaluate.metrics.exact_match import score


def _pairs(count: int) -> list[Pair]:
    generator = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "to", "see", "running", "dogs", "été"]
    return [
        (" ".join(generator.choices(words, k=9)), tuple(" ".join(generator.choices(words, k=7)) for _ in range(2)))
        for _ in range(count)
    ]


def _score(pairs: list[Pair], processes: int) -> list[object]:
    with Progress("scoring", len(pairs), "responses") as progress:
        found = score_pairs(pairs, "default", processes, progress)
    assert progress.done == len(pairs)
    return list(found)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_pool, "_SMALLEST_CHUNK", 300)
    monkeypatch.setattr(score_pool, "_MIN_CHARACTERS_A_HELPER", 2000)


def test_helpers_give_the_scores_of_one_process_in_order(small_chunks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = _pairs(203)
    expected = [score(*pair) for pair in pairs]
    # this process leaves all to the helpers, but for what they give back
    calls = []
    work_here = score_pool._work_here

    def wait_first(*arguments: object) -> None:
        if not calls:
            calls.append(1)
            while not arguments[1].waiting.empty():  # type: ignore[attr-defined]
                pass
        work_here(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(score_pool, "_work_here", wait_first)
    assert _score(pairs, 2) == expected


def test_equal_pairs_are_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counting(*arguments: object) -> object:
        asked.append(arguments)
        return score(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(score_pool, "score", counting)
    pairs = _pairs(4)
    assert _score(pairs * 3, 1) == [score(*pair) for pair in pairs] * 3
    assert len(asked) == 4


@pytest.mark.parametrize(
    "dying",
    ["raise SystemExit", "print('ready', flush=True); input()", "print('ready', flush=True); input(); print('{')"],
)
def test_a_helper_that_dies_hands_its_work_back(
    small_chunks: None, monkeypatch: pytest.MonkeyPatch, dying: str
) -> None:
    monkeypatch.setattr(score_pool, "_COMMAND", (sys.executable, "-c", dying))
    pairs = _pairs(400)
    assert _score(pairs, 3) == [score(*pair) for pair in pairs]


def test_chunks_hold_each_pair_once_and_grow_smaller() -> None:
    pairs = [("x" * (1 + place % 700), ("y" * 300,)) for place in range(20_000)]
    sizes = [len(prediction) + len(references[0]) for prediction, references in pairs]
    chunks = score_pool._chunks(pairs, sizes, 2)
    assert [pair for chunk in chunks for pair in chunk] == pairs
    lengths = [sum(len(prediction) + 300 for prediction, _ in chunk) for chunk in chunks]
    assert 200_000 <= lengths[0] < 201_000
    assert 20_000 <= lengths[-2] < 21_000
    assert all(later < earlier + 1000 for earlier, later in pairwise(lengths))


def test_a_helper_imports_little() -> None:
    heavy = {"nltk", "numpy", "pyarrow", "pydantic", "torch"}
    code = f"import sys, dpkd.evaluate.answers.score_worker; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
