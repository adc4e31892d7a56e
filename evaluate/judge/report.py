"""The report on verdicts: grades, ratios and wins with intervals by model, data set and length bucket."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpkd.core.files import replacing
from dpkd.core.identity import fingerprint, software_versions
from dpkd.evaluate.judge.questions import JudgePrompt
from dpkd.evaluate.judge.rows import Answers, JudgedSet, Question, compared
from dpkd.evaluate.judge.tokens import count_tokens
from dpkd.evaluate.judge.verdicts import Answered
from dpkd.evaluate.metrics.buckets import buckets_of
from dpkd.evaluate.metrics.inference import (
    add_holm,
    mean_intervals,
    paired_differences,
    ratio_interval,
    share_intervals,
)
from dpkd.evaluate.options.judge import JudgeConfig
from dpkd.evaluate.report.provenance import command_text

#: of `judge.json`; what each version holds is in docs/judge.md
FORMAT_VERSION = 2

_GRADES = (1.0, 10.0)

_COLUMNS = (
    *("data", "example_id", "model", "seed", "other", "other_seed", "swapped", "question"),
    *("reply", "read", "finish_reason", "refused"),
)
# what was read, by set, example, model, seed, other model, and whether the pair was swapped
_Outcomes = dict[tuple[str, str, str, int, str | None, bool], tuple[str, ...] | None]


def build_judge_report(
    config: JudgeConfig,
    prompt: JudgePrompt,
    identity: dict[str, Any],
    answers: Answers,
    sets: Sequence[JudgedSet],
    questions: Sequence[Question],
    answered: Mapping[str, Answered],
) -> dict[str, Any]:
    """Everything in `judge.json`; `answered` has the answer to each of `questions`, by key."""
    outcomes = {
        (q.data, q.row.example_id, q.model, q.seed, q.other, q.swapped and q.other is not None): _read(q, answered)
        for q in questions
    }
    report: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint(identity),
        "command": command_text(config, "judge"),
        "mode": config.mode,
        "settings": identity["settings"],
        "identities": {key: identity[key] for key in ("answers", "prompt")},
        "judged": {name: answers.about[name] for judged in sets for name in judged.models},
        "judge": _about_judge(config, prompt, questions, answered),
        "data": {judged.name: {"n": len(judged.rows), "num_rows": judged.num_rows} for judged in sets},
        "unparsable": _unparsable(questions, answered),
        "refused": [
            {"data": q.data, "example_id": q.row.example_id, "model": q.model, "other": q.other, "reason": reason}
            for q in questions
            if (reason := answered[q.key].refused) is not None
        ],
        "tokens": count_tokens(config, [answered[key] for key in dict.fromkeys(q.key for q in questions)]),
        "software": software_versions(),
    }
    if config.mode == "pairwise":
        pairs = {judged.name: _pairs(judged, outcomes, config, answers.by_prediction) for judged in sets}
        return report | {"pairs": pairs}
    models: dict[str, Any] = {}
    comparisons = {}
    for judged in sets:
        graded = {model: _Graded(judged, model, outcomes, answers.by_prediction) for model in judged.models}
        for model, found in graded.items():
            models.setdefault(model, {"data": {}})["data"][judged.name] = found.summary(config)
        comparisons[judged.name] = _comparisons(graded, config, answers.by_prediction)
    return report | {"models": models, "comparisons": comparisons}


def write_per_verdict(path: Path, questions: Sequence[Question], answered: Mapping[str, Answered]) -> None:
    """Write one row per question to `path` (Parquet): what it is about, the reply, what was read from it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"seed": pa.int64(), "other_seed": pa.int64(), "swapped": pa.bool_()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in _COLUMNS])
    rows = []
    for q in questions:
        found = answered[q.key]
        read = found.parsed(q.prompt.form)
        last = found.replies[-1] if found.replies else None
        about = (q.data, q.row.example_id, q.model, q.seed, q.other, q.other_seed, q.swapped, q.key)
        reply = (last and last.content, read and " ".join(read), last and last.finish_reason, found.refused)
        rows.append(dict(zip(_COLUMNS, about + reply, strict=True)))
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary, compression="zstd")


def _read(question: Question, answered: Mapping[str, Answered]) -> tuple[str, ...] | None:
    """What was read from the reply; of two grades, that of the answer comes first."""
    found = answered[question.key].parsed(question.prompt.form)
    return found[::-1] if found is not None and question.prompt.form == "scores" and question.swapped else found


def _about_judge(
    config: JudgeConfig, prompt: JudgePrompt, questions: Sequence[Question], answered: Mapping[str, Answered]
) -> dict[str, Any]:
    said = Counter(reply.model for key in {q.key for q in questions} for reply in answered[key].replies)
    return {
        "url": config.judge_url,
        "model": config.judge_model,
        "models_said": {str(name): count for name, count in sorted(said.items(), key=str)},
        "body": config.request_body(),
        "prompt": {"name": prompt.name, "sha256": prompt.sha256},
        "reask": config.reask,
    }


def _unparsable(questions: Sequence[Question], answered: Mapping[str, Answered]) -> dict[str, Any]:
    """By model: questions about it, and how many have an unparsable reply or none."""
    counts: dict[str, Counter[str]] = {}
    for question in questions:
        found = answered[question.key]
        unread = found.refused is None and found.parsed(question.prompt.form) is None
        for model in filter(None, (question.model, question.other)):
            count = counts.setdefault(model, Counter())
            count["num_questions"] += 1
            count["num_refused"] += found.refused is not None
            count["num_unparsable"] += unread
            count["num_cut_off"] += unread and found.replies[-1].finish_reason == "length"
            count["num_asked_again"] += len(found.replies) > 1
    return {
        model: {**dict(count), "share": count["num_unparsable"] / count["num_questions"]}
        for model, count in counts.items()
    }


class _Graded:
    """The grades [S, N] of one model's answers to one set; NaN if a reply is unparsable."""

    def __init__(self, judged: JudgedSet, model: str, outcomes: _Outcomes, by_prediction: bool) -> None:
        self.judged, self.model, self.by_prediction = judged, model, by_prediction
        self.seeds = judged.seeds(model)
        shape = (len(self.seeds), len(judged.rows))
        self.grades_SN, self.references_SN = np.full(shape, np.nan), np.full(shape, np.nan)
        self.bucket_SN = bucket_indices(judged, model)
        for s, seed in enumerate(self.seeds):
            for n, row in enumerate(judged.rows):
                found = outcomes[judged.name, row.example_id, model, seed, None, False]
                if found is not None:
                    self.grades_SN[s, n] = float(found[0])
                if found is not None and len(found) == 2:
                    self.references_SN[s, n] = float(found[1])

    def summary(self, config: JudgeConfig) -> dict[str, Any]:
        """The part of the report about this model and set."""
        everything = np.full(self.grades_SN.shape, True)
        return {
            **self._scores(everything, config),
            "buckets": [
                bucket._asdict() | self._scores(self.bucket_SN == index, config)
                for index, bucket in enumerate(buckets_of(self.judged.edges))
            ],
            "seeds": [
                {"seed": seed, "grade": _mean(grades_N), "num_grades": int(np.isfinite(grades_N).sum())}
                for seed, grades_N in zip(self.seeds, self.grades_SN, strict=True)
            ],
        }

    def _scores(self, chosen_SN: np.ndarray, config: JudgeConfig) -> dict[str, Any]:
        values = {"grade": np.where(chosen_SN, self.grades_SN, np.nan)}
        if config.grade_reference:
            values["reference_grade"] = np.where(chosen_SN, self.references_SN, np.nan)
        found = mean_intervals(np.stack(list(values.values())), _GRADES)
        scores: dict[str, Any] = {
            "n": int(chosen_SN.any(axis=0).sum()),
            "num_answers": int(chosen_SN.sum()),
            "num_grades": int(np.isfinite(values["grade"]).sum()),
            **{name: interval._asdict() for name, interval in zip(values, found, strict=True)},
        }
        if config.grade_reference:
            counted_N = np.isfinite(values["grade"]).any(axis=0)
            ours_N, theirs_N = (np.nansum(values[name], axis=0)[counted_N] for name in ("grade", "reference_grade"))
            ratio = ratio_interval(ours_N, theirs_N)
            scores["ratio"] = {key: value and 100 * value for key, value in ratio._asdict().items()}
        return scores


def bucket_indices(judged: JudgedSet, model: str) -> np.ndarray:
    """The length bucket of each answer of `model` [S, N], as an index into `buckets_of(judged.edges)`."""
    index = {bucket.label: place for place, bucket in enumerate(buckets_of(judged.edges))}
    return np.array([[index[row.buckets[model][seed]] for row in judged.rows] for seed in judged.seeds(model)])


def _comparisons(graded: Mapping[str, _Graded], config: JudgeConfig, by_prediction: bool) -> list[dict[str, Any]]:
    """Paired differences of grades, over the rows with grades of both models."""
    rows: list[dict[str, Any]] = []
    for model, other in compared(list(graded), config.baseline):
        ours, theirs = graded[model], graded[other]
        differences_N = mean_over_seeds(ours.grades_SN) - mean_over_seeds(theirs.grades_SN)
        row: dict[str, Any] = {"model": model, "baseline": other, **difference(differences_N, config)}
        if not by_prediction:
            row["buckets"] = [
                bucket._asdict() | difference(differences_N[ours.bucket_SN[0] == index], config)
                for index, bucket in enumerate(buckets_of(ours.judged.edges))
            ]
        rows.append(row)
    add_holm(rows)
    return rows


def difference(differences_N: np.ndarray, config: JudgeConfig) -> dict[str, Any]:
    """The mean of the `n` differences that are not NaN, with interval, p-value and counts."""
    known = differences_N[np.isfinite(differences_N)]
    found = paired_differences(known[None], config.num_sign_flips, config.sign_flip_seed)[0]
    return {"n": len(known), **found._asdict()}


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
    by_position = {"A": 1.0, "B": -1.0, "tie": 0.0}
    first, second = by_position[verdict], by_position[verdict_swapped]
    outcome = first if first == -second else 0.0
    return outcome, (first + second) / 2


def _pairs(judged: JudgedSet, outcomes: _Outcomes, config: JudgeConfig, by_prediction: bool) -> list[dict[str, Any]]:
    """For each pair of models, wins, ties and losses, and how much the order of the answers mattered."""
    rows: list[dict[str, Any]] = []
    for model, other in compared(judged.models, config.baseline):
        seeds = judged.seeds(model)
        outcome_SN, preference_SN = np.empty((2, len(seeds), len(judged.rows)))
        for s, seed in enumerate(seeds):
            for n, example in enumerate(judged.rows):
                read = [outcomes[judged.name, example.example_id, model, seed, other, swap] for swap in (False, True)]
                outcome_SN[s, n], preference_SN[s, n] = both_orders(*(found[0] if found else None for found in read))
        row: dict[str, Any] = {"model": model, "baseline": other, **_won(outcome_SN, config)}
        row["position"] = _position(outcome_SN, preference_SN, config)
        row["seeds"] = [
            {"seed": seed, "other_seed": other_seed, **_counts(outcome_SN[s])}
            for s, (seed, other_seed) in enumerate(zip(seeds, judged.seeds(other), strict=True))
        ]
        if not by_prediction:
            bucket_N = bucket_indices(judged, model)[0]
            row["buckets"] = [
                bucket._asdict() | _won(outcome_SN[:, bucket_N == index], config)
                for index, bucket in enumerate(buckets_of(judged.edges))
            ]
        rows.append(row)
    add_holm(rows)
    return rows


def _counts(outcomes: np.ndarray) -> dict[str, int]:
    return {
        "num_wins": int((outcomes == 1).sum()),
        "num_ties": int((outcomes == 0).sum()),
        "num_losses": int((outcomes == -1).sum()),
        "num_undecided": int(np.isnan(outcomes).sum()),
    }


def _won(outcome_SN: np.ndarray, config: JudgeConfig) -> dict[str, Any]:
    """Counts of pairs, shares in per cent of the pairs with both verdicts, and wins minus losses."""
    known_SN = np.isfinite(outcome_SN)
    shares = [np.where(known_SN, 100.0 * (outcome_SN == value), np.nan) for value in (1, 0, -1)]
    intervals = share_intervals(np.stack(shares))
    net = difference(100 * mean_over_seeds(outcome_SN), config)
    return {
        **_counts(outcome_SN),
        **{name: interval._asdict() for name, interval in zip(("win", "tie", "loss"), intervals, strict=True)},
        "net": {key: net[key] for key in ("mean", "low", "high", "smallest_resolvable")},
        "n": net["n"],
        "p_value": net["p_value"],
    }


def _position(outcome_SN: np.ndarray, preference_SN: np.ndarray, config: JudgeConfig) -> dict[str, Any]:
    """How much the position of an answer matters: 0 for a judge that ignores it."""
    known = preference_SN[np.isfinite(preference_SN)]
    preference = mean_intervals(100 * preference_SN[None], (-100.0, 100.0))[0]
    return {
        "num_pairs": len(known),
        "share_agreeing": float((known == 0).mean()) if len(known) else None,
        "num_first_twice": int((known == 1).sum()),
        "num_second_twice": int((known == -1).sum()),
        "first_less_second": preference._asdict(),
    }
