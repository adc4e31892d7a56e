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
from dpkd.evaluate.merge.matching import Part, by_set, check_decoding, check_scoring, match_models, match_sets
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
    scored_sets = [scored for data, of_set in by_set(parts).items() for scored in _scored(config, data, of_set)]
    grades = read_grades(config.judge, scored_sets)
    save_options(config, config.out)
    report = build_merged_report(config, identity, evaluations, parts, scored_sets)
    return write_all(config.out, report, scored_sets, grades)


def _kept_rows(config: MergeConfig, data: str, parts: Sequence[Part]) -> list[str]:
    """The ids of the examples to compare, in the set's order."""
    first, *others = parts
    kept = first_ids = first.ids()
    for part in others:
        ids = {*part.ids()}
        only_one = sorted({*first_ids} - ids) or sorted(ids - {*first_ids})
        if only_one and not config.common_rows:
            raise UserError(
                f"the evaluations of the set {data} have different rows",
                found=f"{len(ids)} in {part.evaluation.directory}",
                expected=f"{len(first_ids)} as in {first.evaluation.directory}; only one has {only_one[0]!r}",
                advice="Evaluate again with the same --limit and --max-prompt-tokens, or give --common-rows",
            )
        kept = [example_id for example_id in kept if example_id in ids]
    if not kept:
        raise UserError(
            f"the evaluations of the set {data} have no row in common",
            where=first.evaluation.directory,
            advice="Evaluate again with the same --limit",
        )
    return kept


def _scored(config: MergeConfig, data: str, parts: Sequence[Part]) -> list[ScoredSet]:
    first, kept = parts[0], _kept_rows(config, data, parts)
    report = first.evaluation.report
    about = report["data"][first.own_data]
    eval_set = read_set(first.rows(), data, about, kept, report["settings"]["rouge_tokenizer"])
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
