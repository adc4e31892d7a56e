"""What a merged report holds: the form of a single one, with the evaluations that it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.identity import fingerprint as fingerprint_of
from dpkd.core.identity import software_versions
from dpkd.evaluate.answers.scoring import ScoredSet
from dpkd.evaluate.merge.evaluations import Evaluation
from dpkd.evaluate.merge.matching import Part
from dpkd.evaluate.metrics.bootstrap import ALPHA, POWER
from dpkd.evaluate.options.merge import MergeConfig
from dpkd.evaluate.report.build import FORMAT_VERSION, Resampling, about_set, compare, summarise
from dpkd.evaluate.report.provenance import command_text, redacted

# settings that the evaluations have in common
_SHARED = ("rouge_tokenizer", "bucket_by", "bucket_of")


def merged_identity(config: MergeConfig, evaluations: Sequence[Evaluation], parts: Sequence[Part]) -> dict[str, Any]:
    """What the merged report is a function of: options, and the evaluations by content; no path."""
    first = evaluations[0].report["settings"]
    identity: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "settings": {
            **{key: first[key] for key in _SHARED},
            **config.model_dump(mode="json", exclude={"evaluations", "out"}),
        },
        "evaluations": [
            {"name": found.name, "fingerprint": found.report["fingerprint"], "rows_sha256": found.rows_sha256}
            for found in evaluations
        ],
        "models": {},
        "predictions": {},
        "data": {},
    }
    for part in parts:
        theirs = part.evaluation.report["identities"]
        identity["data"].setdefault(part.data, theirs["data"][part.own_data])
        if part.own_model in theirs["models"]:
            identity["models"][part.model] = theirs["models"][part.own_model]
        else:
            of_set = theirs["predictions"][part.own_model][part.own_data]
            identity["predictions"].setdefault(part.model, {})[part.data] = of_set
    for key, inner in (("overlap", "cache"), ("duplicates", "train_data")):
        if (union := _union(evaluations, parts, key, inner, {})) is not None:
            identity[inner] = union[inner]
    if runs := _runs(evaluations):
        identity["runs"] = {name: found for name, (_, found) in runs.items()}
    return identity


def build_merged_report(
    config: MergeConfig,
    identity: dict[str, Any],
    fingerprint: str,
    evaluations: Sequence[Evaluation],
    parts: Sequence[Part],
    scored_sets: Sequence[ScoredSet],
) -> dict[str, Any]:
    """`report.json` of all `evaluations`, its keys those of a single one."""
    resampling = Resampling(config.num_bootstrap, config.bootstrap_seed)
    by_set: dict[str, list[ScoredSet]] = {}
    for scored in scored_sets:
        by_set.setdefault(scored.eval_set.name, []).append(scored)
    ids = {data: [example.example_id for example in found[0].eval_set.examples] for data, found in by_set.items()}
    models = _models(parts)
    for scored in scored_sets:
        models[scored.model]["data"][scored.eval_set.name] = summarise(scored, resampling)
    skipped = {data: _skipped(parts, data) for data in by_set}
    by_bucket = identity["settings"]["bucket_of"] == "reference"
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "command": command_text(config, "report"),
        "merged": [
            {
                "directory": redacted(str(found.place)),
                "name": found.name,
                **{key: found.report[key] for key in ("fingerprint", "command", "software")},
            }
            for found in evaluations
        ],
        "settings": identity["settings"],
        "models": models,
        "data": {data: _about_data(parts, data, found[0], len(skipped[data])) for data, found in by_set.items()},
        "comparisons": {data: compare(found, resampling, by_bucket=by_bucket) for data, found in by_set.items()},
        "runs": {name: run for name, (run, _) in _runs(evaluations).items()},
        "significance": {"alpha": ALPHA, "power": POWER},
        "identities": {key: value for key, value in identity.items() if key not in ("format_version", "settings")},
        "overlap": _union(evaluations, parts, "overlap", "cache", ids),
        "duplicates": _union(evaluations, parts, "duplicates", "train_data", ids),
        "skipped": skipped,
        "software": software_versions(),
    }


def _models(parts: Sequence[Part]) -> dict[str, Any]:
    models: dict[str, Any] = {}
    for part in parts:
        about = {**part.about, "data": {}}
        ours = models.setdefault(part.model, {**about, "files": {} if about["files"] else None})
        if about["files"]:
            ours["files"][part.data] = about["files"][part.own_data]
            ours["fingerprint"] = fingerprint_of(_files_identity(parts, part.model))
        ours["to_teacher"] = ours["to_teacher"] or about["to_teacher"]
    return models


def _files_identity(parts: Sequence[Part], model: str) -> dict[str, str]:
    """The identity of predictions, as one evaluation of all their sets would have it."""
    return {
        part.data: part.evaluation.report["identities"]["predictions"][part.own_model][part.own_data]
        for part in parts
        if part.model == model
    }


def _about_data(parts: Sequence[Part], data: str, scored: ScoredSet, num_skipped: int) -> dict[str, Any]:
    found = [part.evaluation.report["data"][part.own_data] for part in parts if part.data == data]
    about = about_set(scored.eval_set)
    num_rows = max(about["num_rows"] for about in found)
    return {
        "file": found[0]["file"],
        **about,
        "num_rows": num_rows,
        "num_without_reference": found[0]["num_without_reference"],
        "num_not_common": num_rows - about["n"] - num_skipped,
    }


def _skipped(parts: Sequence[Part], data: str) -> list[dict[str, Any]]:
    """The rows that every evaluation of the set left out."""
    lists = [part.evaluation.report["skipped"][part.own_data] for part in parts if part.data == data]
    everywhere = set.intersection(*({row["line"] for row in rows} for rows in lists))
    return [row for row in lists[0] if row["line"] in everywhere]


def _union(
    evaluations: Sequence[Evaluation], parts: Sequence[Part], key: str, inner: str, ids: dict[str, list[str]]
) -> dict[str, Any] | None:
    """`overlap` or `duplicates` of all evaluations that have it; several caches (training data) become a list."""
    sources: list[Any] = []
    for evaluation in evaluations:
        if evaluation.report[key] is not None and evaluation.report[key][inner] not in sources:
            sources.append(evaluation.report[key][inner])
    if not sources:
        return None
    held: dict[str, set[str]] = {}
    for part in parts:
        given = part.evaluation.report[key]
        if given is not None:
            held.setdefault(part.data, set()).update(given["rows"].get(part.own_data, []))
    rows = {data: [row for row in ids.get(data, []) if row in found] for data, found in held.items()}
    return {inner: sources[0] if len(sources) == 1 else sources, "rows": rows}


def _runs(evaluations: Sequence[Evaluation]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Each run and its identity; raises `UserError` for two runs of one name."""
    runs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for evaluation in evaluations:
        for own, run in evaluation.report["runs"].items():
            name, identity = evaluation.renamed(own), evaluation.report["identities"]["runs"][own]
            if runs.setdefault(name, (run, identity))[1] != identity:
                raise UserError(
                    f"two evaluations show another run under the name {name!r}",
                    found=run["directory"],
                    expected=runs[name][0]["directory"],
                    where=evaluation.place,
                    advice=f"Give one a name of its own: {evaluation.place.resolve().name}={evaluation.place}",
                )
    return runs
