"""Several finished evaluations as one report: nothing is generated or scored again, all comparisons are new.

Sets are matched by content, rows by id. What does not compare is refused, with both values.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpkd.core.errors import UserError
from dpkd.core.progress import say
from dpkd.evaluate.answers.perplexity import leave_out_for_all
from dpkd.evaluate.answers.scoring import ScoredSet
from dpkd.evaluate.merge.evaluations import open_evaluation, read_set, scored_set
from dpkd.evaluate.merge.grades import read_grades
from dpkd.evaluate.merge.matching import Part, check_decoding, check_scoring, match_models, match_sets
from dpkd.evaluate.merge.merged_report import build_merged_report, merged_identity
from dpkd.evaluate.options.merge import MergeConfig
from dpkd.evaluate.views.output import REPORT, check_options, is_complete, save_options, write_all

_FREE_OPTIONS = frozenset({"out"})


def merge(config: MergeConfig) -> Path:
    """Merge the evaluations of `config` into one report; returns the path of its `report.json`.

    Intervals and paired differences are computed from the rows of each `per_example.parquet`. If the report is complete
    it does nothing. Raises `UserError` for evaluations that are not finished or do not compare.
    """
    check_options(config, config.out, _FREE_OPTIONS, REPORT)
    evaluations = [open_evaluation(text) for text in config.evaluations]
    check_scoring(evaluations)
    sets = match_sets(evaluations)
    parts = match_models(evaluations, sets)
    if not config.allow_different_decoding:
        check_decoding(parts)
    config.roles(list(dict.fromkeys(part.model for part in parts)))
    identity = merged_identity(config, evaluations, parts)
    if is_complete(config.out / REPORT, identity):
        say(f"the merged report in {config.out} is complete already")
        return config.out / REPORT
    kept = {data: _kept_rows(config, data, found) for data, found in _by_set(parts).items()}
    scored_sets = [scored for data, found in _by_set(parts).items() for scored in _scored(data, found, kept[data])]
    grades = read_grades(config.judge, scored_sets)
    save_options(config, config.out)
    report = build_merged_report(config, identity, evaluations, parts, scored_sets)
    return write_all(config.out, report, scored_sets, grades)


def _by_set(parts: Sequence[Part]) -> dict[str, list[Part]]:
    found: dict[str, list[Part]] = {}
    for part in parts:
        found.setdefault(part.data, []).append(part)
    return found


def _kept_rows(config: MergeConfig, data: str, parts: Sequence[Part]) -> list[str]:
    """The ids of the examples to compare, in the set's order."""
    first, *others = ((part, list(next(iter(part.rows().values())))) for part in parts)
    kept = first[1]
    for part, ids in others:
        only_first, only_other = sorted({*first[1]} - {*ids}), sorted({*ids} - {*first[1]})
        if (only_first or only_other) and not config.common_rows:
            raise UserError(
                f"the evaluations of the set {data} have different rows",
                found=f"{len(ids)} in {part.evaluation.directory}",
                expected=f"{len(first[1])} as in {first[0].evaluation.directory}; only one has "
                f"{(only_first or only_other)[0]!r}",
                advice="Evaluate again with the same --limit and --max-prompt-tokens, or give --common-rows",
            )
        known = {*ids}
        kept = [example_id for example_id in kept if example_id in known]
    if not kept:
        raise UserError(
            f"the evaluations of the set {data} have no row in common",
            where=first[0].evaluation.directory,
            advice="Evaluate again with the same --limit",
        )
    return kept


def _scored(data: str, parts: Sequence[Part], kept: list[str]) -> list[ScoredSet]:
    first = parts[0]
    report = first.evaluation.report
    about, identity = report["data"][first.own_data], report["identities"]["data"][first.own_data]
    eval_set = read_set(first.rows(), data, about, identity, kept, report["settings"]["rouge_tokenizer"])
    scored_sets = [scored_set(part.rows(), part.model, eval_set) for part in parts]
    if report["settings"]["bucket_of"] == "reference":
        for part, scored in zip(parts, scored_sets, strict=True):
            if (scored.bucket_SN[0] != scored_sets[0].bucket_SN[0]).any():
                raise UserError(
                    f"rows of the set {data} are in different buckets, as two tokenizers counted their tokens",
                    found=part.evaluation.directory,
                    expected=f"those of {first.evaluation.directory}",
                    advice="Evaluate again with --bucket-by words; --generations reuses the answers",
                )
    leave_out_for_all([{data: scored.references} for scored in scored_sets if scored.references is not None])
    return scored_sets
