"""What was read from replies as numbers: grades, their ratio to the reference's, wins in both orders, position bias.

In shapes, G is 1 for grades of the answers alone, and 2 with those of the references.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from dpkd.evaluate.judge.rows import JudgedSet, compared
from dpkd.evaluate.metrics.buckets import buckets_of
from dpkd.evaluate.metrics.inference import (
    add_holm,
    mean_intervals,
    paired_differences,
    ratio_interval,
    share_intervals,
)
from dpkd.evaluate.options.judge import JudgeConfig

_GRADES = (1.0, 10.0)
_BY_POSITION = {"A": 1.0, "B": -1.0, "tie": 0.0}

#: what was read, by set, example, model, seed, other model, and whether the pair was swapped
Outcomes = Mapping[tuple[str, str, str, int, str | None, bool], tuple[str, ...] | None]


def grades_of(judged: JudgedSet, model: str, outcomes: Outcomes, config: JudgeConfig) -> np.ndarray:
    """The grades of a model's answers, and of the references if they were graded [G, S, N]; NaN if unparsable."""
    seeds = judged.answers[model].seeds
    grades_GSN = np.full((1 + config.grade_reference, len(seeds), len(judged.rows)), np.nan)
    for s, seed in enumerate(seeds):
        for n, example in enumerate(judged.examples):
            if (found := outcomes[judged.name, example.example_id, model, seed, None, False]) is not None:
                grades_GSN[:, s, n] = [float(grade) for grade in found]
    return grades_GSN


def summarise_grades(judged: JudgedSet, model: str, grades_GSN: np.ndarray) -> dict[str, Any]:
    """The part of the report about one model and set."""
    bucket_SN = judged.bucket_SN(model)
    return {
        **_grades(grades_GSN, np.full(bucket_SN.shape, True)),
        "buckets": [
            bucket._asdict() | _grades(grades_GSN, bucket_SN == index)
            for index, bucket in enumerate(buckets_of(judged.eval_set.edges))
        ],
        "seeds": [
            {"seed": seed, "grade": _mean(grades_N), "num_grades": int(np.isfinite(grades_N).sum())}
            for seed, grades_N in zip(judged.answers[model].seeds, grades_GSN[0], strict=True)
        ],
    }


def _grades(grades_GSN: np.ndarray, chosen_SN: np.ndarray) -> dict[str, Any]:
    chosen_GSN = np.where(chosen_SN, grades_GSN, np.nan)
    intervals = mean_intervals(chosen_GSN, _GRADES)
    counted_N = np.isfinite(chosen_GSN[0]).any(axis=0)
    scores: dict[str, Any] = {
        "n": int(chosen_SN.any(axis=0).sum()),
        "num_answers": int(chosen_SN.sum()),
        "num_grades": int(np.isfinite(chosen_GSN[0]).sum()),
        "grade": intervals[0]._asdict(),
    }
    if len(intervals) > 1:
        ratio = ratio_interval(*np.nansum(chosen_GSN, axis=1)[:, counted_N])
        scores["reference_grade"] = intervals[1]._asdict()
        scores["ratio"] = {key: value and 100 * value for key, value in ratio._asdict().items()}
    return scores


def compare_grades(judged: JudgedSet, graded: Mapping[str, np.ndarray], config: JudgeConfig) -> list[dict[str, Any]]:
    """Paired differences of grades, over the rows with grades of both models."""
    pairs = compared([*graded], config.baseline)
    score = partial(_difference, config=config, num_pairs=len(pairs))
    rows: list[dict[str, Any]] = []
    for model, other in pairs:
        differences_N = mean_over_seeds(graded[model][0]) - mean_over_seeds(graded[other][0])
        by_length = _by_length(judged, model, differences_N, score)
        rows.append({"model": model, "baseline": other, **score(differences_N), **by_length})
    add_holm(rows)
    return rows


def summarise_pairs(judged: JudgedSet, outcomes: Outcomes, config: JudgeConfig) -> list[dict[str, Any]]:
    """For each pair of models, wins, ties and losses, and how much the order of the answers mattered."""
    pairs = compared([*judged.answers], config.baseline)
    score = partial(_won, config=config, num_pairs=len(pairs))
    rows: list[dict[str, Any]] = []
    for model, other in pairs:
        seeds, other_seeds = judged.answers[model].seeds, judged.answers[other].seeds
        outcome_SN, preference_SN = np.empty((2, len(seeds), len(judged.rows)))
        for s, seed in enumerate(seeds):
            for n, example in enumerate(judged.examples):
                read = [outcomes[judged.name, example.example_id, model, seed, other, swap] for swap in (False, True)]
                outcome_SN[s, n], preference_SN[s, n] = both_orders(*(found[0] if found else None for found in read))
        rows.append(
            {
                "model": model,
                "baseline": other,
                **score(outcome_SN),
                "position": _position(preference_SN),
                "seeds": [
                    {"seed": seed, "other_seed": other_seed, **_counts(outcome_N)}
                    for seed, other_seed, outcome_N in zip(seeds, other_seeds, outcome_SN, strict=True)
                ],
                **_by_length(judged, model, outcome_SN, score),
            }
        )
    add_holm(rows)
    return rows


def _by_length(
    judged: JudgedSet, model: str, values: np.ndarray, score: Callable[[np.ndarray], dict[str, Any]]
) -> dict[str, Any]:
    """`score` of the values [..., N] in each length bucket; nothing where two models have different rows in one."""
    if judged.by_prediction:
        return {}
    bucket_N = judged.bucket_SN(model)[0]
    buckets = enumerate(buckets_of(judged.eval_set.edges))
    return {"buckets": [bucket._asdict() | score(values[..., bucket_N == index]) for index, bucket in buckets]}


def _difference(
    differences_N: np.ndarray, config: JudgeConfig, num_pairs: int, largest: float = _GRADES[1] - _GRADES[0]
) -> dict[str, Any]:
    """The mean of the `n` differences that are not NaN, with interval, p-value and counts; one of `num_pairs`."""
    known_N = differences_N[np.isfinite(differences_N)]
    flips = (config.num_sign_flips, config.sign_flip_seed)
    (found,) = paired_differences(known_N[None], *flips, family_size=num_pairs, limits=(-largest, largest))
    return {"n": len(known_N), **found._asdict()}


def mean_over_seeds(values_SN: np.ndarray) -> np.ndarray:
    """The mean of each example's values that are not NaN [N]; NaN if there is none."""
    counts_N = np.isfinite(values_SN).sum(axis=0)
    return np.where(counts_N > 0, np.nansum(values_SN, axis=0) / np.maximum(counts_N, 1), np.nan)


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def both_orders(verdict: str | None, verdict_swapped: str | None) -> tuple[float, float]:
    """The outcome of a pair, and the judge's preference for a position, from its two verdicts.

    Outcome: 1 if A of the first order won in both orders, -1 if it lost in both, else 0. Preference: 1 if the first
    answer won in both orders, -1 if the second did, a half if one of them was a tie, 0 if the orders agree. Both are
    NaN if a verdict is missing.
    """
    if verdict is None or verdict_swapped is None:
        return float("nan"), float("nan")
    first, second = _BY_POSITION[verdict], _BY_POSITION[verdict_swapped]
    outcome = first if first == -second else 0.0
    return outcome, (first + second) / 2


def _counts(outcomes: np.ndarray) -> dict[str, int]:
    return {
        "num_wins": int((outcomes == 1).sum()),
        "num_ties": int((outcomes == 0).sum()),
        "num_losses": int((outcomes == -1).sum()),
        "num_undecided": int(np.isnan(outcomes).sum()),
    }


def _won(outcome_SN: np.ndarray, config: JudgeConfig, num_pairs: int) -> dict[str, Any]:
    """Counts of pairs, shares in per cent of the pairs with both verdicts, and wins minus losses."""
    shares = [np.where(np.isfinite(outcome_SN), 100.0 * (outcome_SN == value), np.nan) for value in (1, 0, -1)]
    intervals = share_intervals(np.stack(shares))
    net = _difference(100 * mean_over_seeds(outcome_SN), config, num_pairs, largest=100.0)
    return {
        **_counts(outcome_SN),
        **{name: interval._asdict() for name, interval in zip(("win", "tie", "loss"), intervals, strict=True)},
        "net": {key: net[key] for key in ("mean", "low", "high", "smallest_resolvable")},
        "n": net["n"],
        "p_value": net["p_value"],
    }


def _position(preference_SN: np.ndarray) -> dict[str, Any]:
    """How much the position of an answer matters: 0 for a judge that ignores it."""
    known = preference_SN[np.isfinite(preference_SN)]
    (preference,) = mean_intervals(100 * preference_SN[None], (-100.0, 100.0))
    return {
        "num_pairs": len(known),
        "share_agreeing": float((known == 0).mean()) if len(known) else None,
        "num_first_twice": int((known == 1).sum()),
        "num_second_twice": int((known == -1).sum()),
        "first_less_second": preference._asdict(),
    }
