"""The report as data: scores by model, data set and length bucket, differences between models, provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from dpkd.core.identity import fingerprint, software_versions
from dpkd.evaluate.answers.perplexity import ModelMetrics
from dpkd.evaluate.answers.scoring import ScoredSet
from dpkd.evaluate.inputs.eval_sets import EvalSet
from dpkd.evaluate.metrics.inference import ALPHA, DIFFERENCES, POWER, add_holm, paired_differences
from dpkd.evaluate.options.comparing import ComparingOptions
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.evaluate.report.provenance import about_models, command_text, redacted
from dpkd.evaluate.report.summaries import summarise, teacher_summary

#: of `report.json`; docs/evaluation.md documents it
FORMAT_VERSION = 4
_KEYS = (
    *("format_version", "fingerprint", "command", "merged", "settings", "roles", "models", "data", "comparisons"),
    *("runs", "significance", "identities", "overlap", "duplicates", "skipped", "software"),
)
_COMPARED = ("rouge_l", "exact_match")


def build_report(
    config: EvalConfig,
    identity: dict[str, Any],
    eval_sets: Sequence[EvalSet],
    scored_sets: Sequence[ScoredSet],
    metrics: Mapping[str, ModelMetrics],
    *,
    sizes: Mapping[str, int | None] | None = None,
    in_cache: dict[str, Any] | None = None,
    in_train_data: dict[str, Any] | None = None,
    runs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything in `report.json`.

    Args:
        config: the options; their paths appear in the report but are not part of its identity.
        identity: the settings, and models and data by content.
        eval_sets: the data sets, in order.
        scored_sets: the scored answers of each model to each set.
        metrics: metrics of the models themselves, by name; predictions have none.
        sizes: numbers of parameters by model; predictions have none.
        in_cache: contamination by the cache; None without one.
        in_train_data: contamination by the training data; None without.
        runs: training curves by name.
    """
    models = about_models(config, identity)
    for scored in scored_sets:
        models[scored.model]["data"][scored.eval_set.name] = summarise(scored)
    for name, model in models.items():
        model["num_parameters"] = (sizes or {}).get(name)
        model["to_teacher"] = teacher_summary(metrics[name].to_teacher) if name in metrics else None
    by_set = {found.name: [scored for scored in scored_sets if scored.eval_set is found] for found in eval_sets}
    by_bucket = config.bucket_of == "reference"  # otherwise two models have different rows in a bucket
    return report_form(
        identity,
        command=command_text(config, "eval"),
        merged=None,
        roles=config.roles(config.names),
        models=models,
        data={found.name: {"file": redacted(config.data[found.name]), **about_set(found)} for found in eval_sets},
        comparisons={name: compare(of_set, config, by_bucket=by_bucket) for name, of_set in by_set.items()},
        runs=runs or {},
        overlap=in_cache,
        duplicates=in_train_data,
        skipped={
            found.name: [{"line": row.line, "reason": row.reason} for row in found.skipped] for found in eval_sets
        },
    )


def report_form(identity: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """`report.json` of one evaluation or a merged one, its keys in order; `parts` are those that differ by kind."""
    parts |= {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint(identity),
        "settings": identity["settings"],
        "significance": {"alpha": ALPHA, "power": POWER},
        "identities": {key: value for key, value in identity.items() if key not in ("format_version", "settings")},
        "software": software_versions(),
    }
    return {key: parts[key] for key in _KEYS}


def about_set(eval_set: EvalSet) -> dict[str, Any]:
    """What `report.json` holds of a set itself."""
    return {
        "n": len(eval_set.examples),
        "num_rows": eval_set.num_rows,
        "num_without_reference": eval_set.num_without_reference,
        "num_not_common": 0,
        "edges": list(eval_set.edges),
        "lost_text": eval_set.lost._asdict(),
    }


def compare(scored_sets: Sequence[ScoredSet], options: ComparingOptions, *, by_bucket: bool) -> list[dict[str, Any]]:
    """Every model on one set minus `--baseline`, or without it every pair: the later minus the earlier model.

    The comparisons of a set, overall, are the family of Holm's adjustment. A set that the baseline has not answered has
    none.
    """
    pairs = [(one, other) for one, other in combinations(scored_sets, 2) if options.baseline is None]
    for baseline in (scored for scored in scored_sets if scored.model == options.baseline):
        pairs += [(baseline, scored) for scored in scored_sets if scored is not baseline]
    if not pairs:
        return []
    bucket_N = scored_sets[0].bucket_SN[0]
    rows: list[dict[str, Any]] = [{"model": model.model, "baseline": baseline.model} for baseline, model in pairs]
    for row, differences in zip(rows, _differences(pairs, np.full(bucket_N.shape, True), options), strict=True):
        row.update(differences)
    for category, indices in scored_sets[0].eval_set.categories().items():
        chosen_N = np.isin(np.arange(len(bucket_N)), indices)
        for row, differences in zip(rows, _differences(pairs, chosen_N, options), strict=True):
            row.setdefault("categories", []).append({"category": category, **differences})
    if by_bucket:
        for index in range(len(scored_sets[0].eval_set.edges) + 1):
            for row, differences in zip(rows, _differences(pairs, bucket_N == index, options), strict=True):
                row.setdefault("buckets", []).append(differences)
    for metric in _COMPARED:
        add_holm([row[metric] for row in rows])
    return rows


def _differences(
    pairs: Sequence[tuple[ScoredSet, ScoredSet]], chosen_N: np.ndarray, options: ComparingOptions
) -> list[dict[str, dict[str, Any]]]:
    """For each (baseline, model) the difference in each compared metric over the chosen examples."""
    differences_KN = np.stack(
        [
            model.scores[metric][:, chosen_N].mean(axis=0) - baseline.scores[metric][:, chosen_N].mean(axis=0)
            for baseline, model in pairs
            for metric in _COMPARED
        ]
    )
    flips = (options.num_sign_flips, options.sign_flip_seed)
    differences = iter(paired_differences(differences_KN, *flips, limits=DIFFERENCES))
    return [{metric: next(differences)._asdict() for metric in _COMPARED} for _ in pairs]


def summaries_of(report: Mapping[str, Any], data: str) -> dict[str, Any]:
    """The summaries of the models evaluated on `data`; a merged report may have other models too."""
    return {name: model["data"][data] for name, model in report["models"].items() if data in model["data"]}


def length_text(report: Mapping[str, Any]) -> str:
    """Whose length the buckets are of, and in which unit."""
    settings = report["settings"]
    whose = "answer itself" if settings["bucket_of"] == "prediction" else "gold response"
    return f"length of the {whose} in {settings['bucket_by']}"
