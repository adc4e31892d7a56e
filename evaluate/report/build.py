"""The report: scores with intervals by model, data set and length bucket, differences between models, as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpkd.core.files import write_text
from dpkd.core.identity import software_versions
from dpkd.evaluate.answers.perplexity import ModelMetrics
from dpkd.evaluate.answers.scoring import ScoredSet
from dpkd.evaluate.inputs.eval_sets import EvalSet
from dpkd.evaluate.metrics.bootstrap import ALPHA, POWER, differences_of, holm, mean_intervals, smallest_resolvable
from dpkd.evaluate.metrics.buckets import buckets_of
from dpkd.evaluate.metrics.exact_match import distinct
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.evaluate.report.measures_summary import reference_summary, teacher_summary
from dpkd.evaluate.report.provenance import about_models, command_text, redacted

#: of `report.json`; what each version holds is in docs/evaluation.md
FORMAT_VERSION = 3
#: the metrics in which models are compared
COMPARED = ("rouge_l", "exact_match")


class Resampling(NamedTuple):
    """Of the bootstrap: resamples, and the seed of their draws."""

    num_bootstrap: int
    seed: int


def build_report(
    config: EvalConfig,
    identity: dict[str, Any],
    fingerprint: str,
    eval_sets: Sequence[EvalSet],
    scored_sets: Sequence[ScoredSet],
    overlap: dict[str, Any] | None = None,
    duplicates: dict[str, Any] | None = None,
    runs: dict[str, Any] | None = None,
    metrics: Mapping[str, ModelMetrics] | None = None,
) -> dict[str, Any]:
    """Everything that `report.json` holds.

    `identity` is what `fingerprint` was taken of: the settings, and models and data by content. Software
    versions stand outside of it, as do the command and the places of models and data. Scores run from 0 to 100, token
    counts have EOS; the interval of a bucket without rows is all null. `overlap` is None where no cache was given,
    `duplicates` where no training data was; `runs` holds the training curves by name, `measures`
    what was measured of the models themselves.
    """
    resampling = Resampling(config.num_bootstrap, config.bootstrap_seed)
    models = about_models(config, identity)
    for scored in scored_sets:
        models[scored.model]["data"][scored.eval_set.name] = summarise(scored, resampling)
    for name, model in models.items():
        of_model = (metrics or {}).get(name)
        model["to_teacher"] = None if of_model is None else teacher_summary(of_model.to_teacher, *resampling)
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "command": command_text(config, "eval"),
        "merged": None,
        "settings": identity["settings"],
        "models": models,
        "data": {
            eval_set.name: {"file": redacted(config.data[eval_set.name]), **about_set(eval_set)}
            for eval_set in eval_sets
        },
        "comparisons": {
            eval_set.name: compare(
                [scored for scored in scored_sets if scored.eval_set is eval_set],
                resampling,
                # else two models have different rows in a bucket
                by_bucket=config.bucket_of == "reference",
            )
            for eval_set in eval_sets
        },
        "runs": runs or {},
        "significance": {"alpha": ALPHA, "power": POWER},
        "identities": {
            key: identity[key]
            for key in ("models", "predictions", "data", "cache", "train_data", "runs")
            if key in identity
        },
        "overlap": overlap,
        "duplicates": duplicates,
        "skipped": {
            eval_set.name: [{"line": row.line, "reason": row.reason} for row in eval_set.skipped]
            for eval_set in eval_sets
        },
        "software": software_versions(),
    }


def about_set(eval_set: EvalSet) -> dict[str, Any]:
    """What `report.json` holds of a set itself."""
    return {
        "n": len(eval_set.examples),
        "num_rows": eval_set.num_rows,
        "num_without_reference": eval_set.num_without_reference,
        "num_not_common": 0,
        "edges": list(eval_set.edges),
        "lost_text": eval_set.lost.as_dict(),
    }


def summarise(scored: ScoredSet, resampling: Resampling) -> dict[str, Any]:
    """What `report.json` holds of one model's answers to one set."""
    answers = [answer for answers_N in scored.answers_SN for answer in answers_N]
    num_tokens = [answer.num_tokens for answer in answers if answer.num_tokens is not None]
    reasons = [answer.finish_reason for answer in answers if answer.finish_reason is not None]
    summary: dict[str, Any] = {
        "n": len(scored.eval_set.examples),
        **_intervals(scored, np.full(scored.bucket_SN.shape, True), resampling),
        **reference_summary(scored.references, scored.bucket_SN, None, *resampling),
        "seeds": _seeds(scored, np.full(scored.bucket_SN.shape, True)),
        "buckets": [],
    }
    for index, bucket in enumerate(buckets_of(scored.eval_set.edges)):
        in_bucket_SN = scored.bucket_SN == index
        summary["buckets"].append(
            {
                "low": bucket.low,
                "high": bucket.high,
                "n": int(in_bucket_SN.any(axis=0).sum()),
                "num_answers": int(in_bucket_SN.sum()),
                **_intervals(scored, in_bucket_SN, resampling),
                **reference_summary(scored.references, scored.bucket_SN, index, *resampling),
                "seeds": _seeds(scored, in_bucket_SN),
            }
        )
    # what two models with unrelated scores would need: rows scored by both usually resolve smaller differences
    resolvable = smallest_resolvable(scored.scores["rouge_l"].mean(axis=0))
    summary["smallest_resolvable_unpaired"] = None if resolvable is None else math.sqrt(2) * resolvable
    for size in (1, 2):
        found = [distinct((answer.response for answer in answers_N), size) for answers_N in scored.answers_SN]
        known = [value for value in found if value is not None]
        summary[f"distinct_{size}"] = float(np.mean(known)) if known else None
    summary["mean_response_tokens"] = float(np.mean(num_tokens)) if num_tokens else None
    summary["share_unfinished"] = float(np.mean([reason == "length" for reason in reasons])) if reasons else None
    return summary


def _intervals(scored: ScoredSet, counted_SN: np.ndarray, resampling: Resampling) -> dict[str, Any]:
    # one seed for all: every model is resampled alike, so that their intervals differ by their answers alone
    values_KSN = np.stack([np.where(counted_SN, values_SN, np.nan) for values_SN in scored.scores.values()])
    intervals = mean_intervals(values_KSN, *resampling)
    return {metric: interval.as_dict() for metric, interval in zip(scored.scores, intervals, strict=True)}


def _seeds(scored: ScoredSet, counted_SN: np.ndarray) -> list[dict[str, Any]]:
    """Each seed's own means over the answers that count; None where it has none."""
    return [
        {
            "seed": seed,
            **{
                metric: float(values_SN[place][counted_SN[place]].mean()) if counted_SN[place].any() else None
                for metric, values_SN in scored.scores.items()
            },
        }
        for place, seed in enumerate(scored.seeds)
    ]


def compare(scored_sets: Sequence[ScoredSet], resampling: Resampling, *, by_bucket: bool) -> list[dict[str, Any]]:
    """Every pair of models on one set: the later one less the earlier one, its baseline."""
    pairs = list(combinations(scored_sets, 2))
    if not pairs:
        return []
    bucket_N = scored_sets[0].bucket_SN[0]
    rows: list[dict[str, Any]] = [{"model": model.model, "baseline": baseline.model} for baseline, model in pairs]
    for row, found in zip(rows, _differences(pairs, np.full(bucket_N.shape, True), resampling), strict=True):
        row.update(found)
    if by_bucket:
        for index in range(len(scored_sets[0].eval_set.edges) + 1):
            for row, found in zip(rows, _differences(pairs, bucket_N == index, resampling), strict=True):
                row.setdefault("buckets", []).append(found)
    for metric in COMPARED:
        for row, p_value in zip(rows, holm([row[metric]["p_value"] for row in rows]), strict=True):
            row[metric]["p_holm"] = p_value
    return rows


def _differences(
    pairs: Sequence[tuple[ScoredSet, ScoredSet]], chosen_N: np.ndarray, resampling: Resampling
) -> list[dict[str, dict[str, Any]]]:
    """For each (baseline, model) the difference in each compared metric over the chosen examples, from shared draws."""
    differences_KN = np.stack(
        [
            model.scores[metric][:, chosen_N].mean(axis=0) - baseline.scores[metric][:, chosen_N].mean(axis=0)
            for baseline, model in pairs
            for metric in COMPARED
        ]
    )
    found = iter(differences_of(differences_KN, *resampling))
    return [{metric: next(found).as_dict() for metric in COMPARED} for _ in pairs]


def summaries_of(report: dict[str, Any], data: str) -> dict[str, Any]:
    """The summaries of the models that were evaluated on `data` (a merged report may have others)."""
    return {name: model["data"][data] for name, model in report["models"].items() if data in model["data"]}


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write `report.json`, whole or not at all; it is the last file, and says that all others are there."""
    write_text(path, json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def length_text(report: dict[str, Any]) -> str:
    """Whose length the buckets are of, and in which unit."""
    settings = report["settings"]
    whose = "answer itself" if settings["bucket_of"] == "prediction" else "gold response"
    return f"length of the {whose} in {settings['bucket_by']}"
