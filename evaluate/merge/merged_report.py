"""The contents of a merged report: those of a single one, and the evaluations that it combines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.identity import fingerprint
from dpkd.evaluate.answers.scoring import ScoredSet
from dpkd.evaluate.inputs.eval_sets import NOT_SCORABLE, EvalSet
from dpkd.evaluate.merge.evaluations import Evaluation
from dpkd.evaluate.merge.grades import grades_identity
from dpkd.evaluate.merge.matching import SCORING, Part, by_set
from dpkd.evaluate.options.merge import MergeConfig
from dpkd.evaluate.report.build import FORMAT_VERSION, about_set, compare, report_form
from dpkd.evaluate.report.provenance import command_text, redacted
from dpkd.evaluate.report.summaries import summarise


def merged_identity(config: MergeConfig, evaluations: Sequence[Evaluation], parts: Sequence[Part]) -> dict[str, Any]:
    """What the merged report depends on: options, and the evaluations by content; no path."""
    first = evaluations[0].report["settings"]
    identity: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "settings": {
            **{key: first[key] for key in SCORING},
            **config.model_dump(mode="json", exclude={"evaluations", "judge", "out"}),
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
    if config.judge:
        identity["judge"] = grades_identity(config.judge)
    if runs := _runs(evaluations):
        identity["runs"] = {name: found for name, (_, found) in runs.items()}
    return identity


def build_merged_report(
    config: MergeConfig,
    identity: dict[str, Any],
    evaluations: Sequence[Evaluation],
    parts: Sequence[Part],
    scored_sets: Sequence[ScoredSet],
) -> dict[str, Any]:
    """The `report.json` of all `evaluations`, with the keys of a single one."""
    models = _models(parts, identity)
    scored_by_set: dict[str, list[ScoredSet]] = {}
    for scored in scored_sets:
        scored_by_set.setdefault(scored.eval_set.name, []).append(scored)
        models[scored.model]["data"][scored.eval_set.name] = summarise(scored)
    eval_sets = {data: of_set[0].eval_set for data, of_set in scored_by_set.items()}
    parts_by_set = by_set(parts)
    skipped = {data: _skipped(of_set) for data, of_set in parts_by_set.items()}
    by_bucket = identity["settings"]["bucket_of"] == "reference"
    return report_form(
        identity,
        command=command_text(config, "report"),
        merged=[
            {
                "directory": redacted(str(evaluation.directory)),
                "name": evaluation.name,
                **{key: evaluation.report[key] for key in ("fingerprint", "command", "software")},
            }
            for evaluation in evaluations
        ],
        roles=config.roles(list(models)),
        models=models,
        data={data: _about_data(of_set, eval_sets[data], skipped[data]) for data, of_set in parts_by_set.items()},
        comparisons={data: compare(of_set, config, by_bucket=by_bucket) for data, of_set in scored_by_set.items()},
        runs={name: run for name, (run, _) in _runs(evaluations).items()},
        overlap=_union(evaluations, parts, "overlap", "cache", eval_sets),
        duplicates=_union(evaluations, parts, "duplicates", "train_data", eval_sets),
        skipped=skipped,
    )


def _models(parts: Sequence[Part], identity: dict[str, Any]) -> dict[str, Any]:
    models: dict[str, Any] = {}
    for part in parts:
        about = {**part.about, "data": {}}
        ours = models.setdefault(part.model, {**about, "files": {} if about["files"] else None})
        if about["files"]:
            ours["files"][part.data] = about["files"][part.own_data]
            ours["fingerprint"] = fingerprint(identity["predictions"][part.model])
        ours["to_teacher"] = ours["to_teacher"] or about["to_teacher"]
    return models


def _about_data(parts: Sequence[Part], eval_set: EvalSet, skipped: list[dict[str, Any]]) -> dict[str, Any]:
    found = [part.evaluation.report["data"][part.own_data] for part in parts]
    evaluated = set().union(*(part.ids() for part in parts))
    return {
        "file": found[0]["file"],
        **about_set(eval_set),
        "num_rows": max(about["num_rows"] for about in found),
        "num_without_reference": sum(row["reason"] == NOT_SCORABLE for row in skipped),
        "num_not_common": len(evaluated) - len(eval_set.examples),
    }


def _skipped(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The rows that every evaluation of the set left out."""
    lists = [part.evaluation.report["skipped"][part.own_data] for part in parts]
    everywhere = set.intersection(*({row["line"] for row in rows} for rows in lists))
    return [row for row in lists[0] if row["line"] in everywhere]


def _union(
    evaluations: Sequence[Evaluation], parts: Sequence[Part], key: str, inner: str, eval_sets: Mapping[str, EvalSet]
) -> dict[str, Any] | None:
    """`overlap` or `duplicates` of all evaluations that have it; several caches (or training data) become a list."""
    sources: list[Any] = []
    for evaluation in evaluations:
        if evaluation.report[key] is not None and evaluation.report[key][inner] not in sources:
            sources.append(evaluation.report[key][inner])
    if not sources:
        return None
    contaminated: dict[str, set[str]] = {}
    for part in parts:
        given = part.evaluation.report[key]
        if given is not None:
            contaminated.setdefault(part.data, set()).update(given["rows"].get(part.own_data, []))
    rows = {
        data: [example.example_id for example in eval_set.examples if example.example_id in contaminated[data]]
        for data, eval_set in eval_sets.items()
        if data in contaminated
    }
    return {inner: sources[0] if len(sources) == 1 else sources, "rows": rows}


def _runs(evaluations: Sequence[Evaluation]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Each run and its identity; raises `UserError` for two runs of one name."""
    runs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for evaluation in evaluations:
        for own, run in evaluation.report["runs"].items():
            name, identity = evaluation.renamed(own), evaluation.report["identities"]["runs"][own]
            if runs.setdefault(name, (run, identity))[1] != identity:
                raise UserError(
                    f"two evaluations use the name {name!r} for different runs",
                    found=run["directory"],
                    expected=runs[name][0]["directory"],
                    where=evaluation.directory,
                    advice=f"Rename one of them: {evaluation.directory.resolve().name}={evaluation.directory}",
                )
    return runs
