"""The report: means with intervals by model, data set and length bucket, as JSON and as a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpkd.evaluate.bootstrap import mean_interval
from dpkd.evaluate.buckets import Bucket, buckets_of
from dpkd.evaluate.config import EvalConfig
from dpkd.evaluate.eval_sets import EvalSet
from dpkd.evaluate.scoring import ScoredSet, bucket_indices
from dpkd.teacher_cache.files import write_text
from dpkd.teacher_cache.identity import software_versions

FORMAT_VERSION = 1


def build_report(
    config: EvalConfig,
    identity: dict[str, Any],
    fingerprint: str,
    eval_sets: Sequence[EvalSet],
    scored_sets: Sequence[ScoredSet],
    overlap: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that `report.json` holds.

    `identity` is what `fingerprint` was taken of: the settings, and models and data by content. Software
    versions stand outside of it. Scores run from 0 to 100, lengths are tokens (EOS included), bucket edges
    are words; the interval of a bucket without rows is all null. `overlap` is None where no cache was given.
    """
    models: dict[str, Any] = {name: {"data": {}} for name in config.model}
    for scored in scored_sets:
        models[scored.model]["data"][scored.eval_set.name] = _summary(scored, config)
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "settings": identity["settings"],
        "models": models,
        "data": {eval_set.name: {"n": len(eval_set.examples)} for eval_set in eval_sets},
        "identities": {key: identity[key] for key in ("models", "data", "cache") if key in identity},
        "overlap": overlap,
        "skipped": {
            eval_set.name: [{"line": row.line, "reason": row.reason} for row in eval_set.skipped]
            for eval_set in eval_sets
        },
        "software": software_versions(),
    }


def _summary(scored: ScoredSet, config: EvalConfig) -> dict[str, Any]:
    bucket_N = bucket_indices(scored.eval_set, config.buckets)
    answers = [answer for answers_N in scored.answers_SN for answer in answers_N]
    return {
        "n": len(bucket_N),
        **_intervals(scored, np.full(len(bucket_N), True), config),
        "buckets": [
            {
                "low": bucket.low,
                "high": bucket.high,
                "n": int((bucket_N == index).sum()),
                **_intervals(scored, bucket_N == index, config),
            }
            for index, bucket in enumerate(buckets_of(config.buckets))
        ],
        "seeds": [
            {"seed": seed, "rouge_l": float(rouge_l_N.mean()), "exact_match": float(exact_match_N.mean())}
            for seed, rouge_l_N, exact_match_N in zip(
                scored.seeds, scored.rouge_l_SN, scored.exact_match_SN, strict=True
            )
        ],
        "mean_response_tokens": float(np.mean([answer.num_tokens for answer in answers])),
        "share_unfinished": float(np.mean([answer.finish_reason == "length" for answer in answers])),
    }


def _intervals(scored: ScoredSet, chosen_N: np.ndarray, config: EvalConfig) -> dict[str, Any]:
    # one seed for all: every model is resampled alike, so that their intervals differ by their answers alone
    return {
        metric: mean_interval(scores_SN[:, chosen_N], config.num_bootstrap, config.bootstrap_seed).as_dict()
        for metric, scores_SN in (("rouge_l", scored.rouge_l_SN), ("exact_match", scored.exact_match_SN))
    }


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write `report.json`, whole or not at all; it is the last file, and says that all others are there."""
    write_text(path, json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def decoding_text(report: dict[str, Any]) -> str:
    """How answers were drawn, in words: seeds, temperature, top-p and the longest answer in tokens."""
    settings = report["settings"]
    seeds = ", ".join(map(str, settings["seeds"]))
    drawn = (
        "greedy"
        if settings["temperature"] == 0
        else f"temperature {settings['temperature']:g}, top-p {settings['top_p']:g}"
    )
    label = "seeds" if len(settings["seeds"]) > 1 else "seed"
    return f"{drawn}, {label} {seeds}, at most {settings['max_new_tokens']} tokens"


def markdown_table(report: dict[str, Any]) -> str:
    """The report as Markdown: a table for each data set with a row for each model. Ends with a line break."""
    settings = report["settings"]
    parts = [
        "# Evaluation\n",
        f"Template {settings['template']}; {decoding_text(report)}. Rouge-L and exact match from 0 to 100, "
        "each row's score averaged over seeds; in brackets the 95% bootstrap interval over rows. Columns "
        "such as [0,30) hold the Rouge-L of the rows whose gold response has so many words.\n",
    ]
    for data, about in report["data"].items():
        num_skipped = len(report["skipped"][data])
        left_out = f", {num_skipped} left out" if num_skipped else ""
        if report.get("overlap"):
            left_out += f", {len(report['overlap']['rows'][data])} of the prompts also in the training cache"
        parts += [f"## {data} ({about['n']} rows{left_out})\n", _table(report, data)]
    return "\n".join(parts)


def _table(report: dict[str, Any], data: str) -> str:
    summaries = {name: model["data"][data] for name, model in report["models"].items()}
    buckets = next(iter(summaries.values()))["buckets"]
    header = ["Model", "Rouge-L"]
    header += [f"{Bucket(bucket['low'], bucket['high']).label} (n={bucket['n']})" for bucket in buckets]
    header.append("Exact match")
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, summary in summaries.items():
        scores = [
            summary["rouge_l"],
            *(bucket["rouge_l"] for bucket in summary["buckets"]),
            summary["exact_match"],
        ]
        rows.append([f"`{name}`", *map(_cell, scores)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(interval: dict[str, float | None]) -> str:
    if interval["mean"] is None:
        return "-"
    return f"{interval['mean']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"
