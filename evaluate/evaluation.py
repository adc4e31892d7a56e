"""One evaluation from options to report: check everything cheap, generate, measure, score, write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpkd.core.progress import Progress, say
from dpkd.evaluate.answers.answers import ModelAnswers
from dpkd.evaluate.answers.generation import LazyEngine, generate_answers
from dpkd.evaluate.answers.perplexity import (
    ModelMetrics,
    engine_options,
    leave_out_for_all,
    measure_references,
    measure_to_teacher,
    reference_pairs,
)
from dpkd.evaluate.answers.predictions import Predictions, read_predictions
from dpkd.evaluate.answers.scoring import ScoredSet, score_sets
from dpkd.evaluate.inputs.contamination import find_in_cache, find_in_train_data
from dpkd.evaluate.inputs.eval_sets import EvalSet, read_eval_sets
from dpkd.evaluate.inputs.models import Candidate, open_candidates
from dpkd.evaluate.inputs.named_sets import resolve_sets
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.evaluate.report.build import FORMAT_VERSION, build_report
from dpkd.evaluate.report.curves import find_runs, read_run, run_identity
from dpkd.evaluate.views.output import REPORT, check_options, is_complete, save_options, write_all
from dpkd.teacher_cache.engines.engine import ResolvedEngine
from dpkd.teacher_cache.engines.open import resolve_engine

# options that change no number: where results go, and how much memory is used
_FREE_OPTIONS = frozenset({"out", "max_num_seqs", "generations", "data_dir"})


def evaluate(config: EvalConfig) -> Path:
    """Evaluate the models and predictions of `config` on its data; returns the path of `report.json`.

    After a crash, call it again: it generates only what is missing. If the report is complete it does nothing. Raises
    `UserError` for options that cannot be used, before any model runs.
    """
    engine = resolve_engine(config.engine) if config.model else None
    # resolved first, so that the saved options record what ran
    seeds = config.resolved_seeds() if config.model else None  # predictions have their own
    config = config.model_copy(update={"seeds": seeds, "data": resolve_sets(config)})
    config.roles(config.names)
    check_options(config, config.out, _FREE_OPTIONS, REPORT)
    candidates = open_candidates(config)
    eval_sets = read_eval_sets(config, candidates)
    predictions = read_predictions(config, eval_sets)
    in_cache = find_in_cache(config.cache, candidates, eval_sets)
    in_train_data = find_in_train_data(config.train_data, eval_sets)
    run_directories = find_runs(config)
    runs = {name: read_run(name, directory) for name, directory in run_directories.items()}
    identity = _identity(config, engine, candidates, eval_sets, predictions)
    if in_cache is not None:
        identity["cache"] = in_cache["cache"]
    if in_train_data is not None:
        identity["train_data"] = in_train_data["train_data"]
    if runs:
        identity["runs"] = {name: run_identity(directory) for name, directory in run_directories.items()}
    report_path = config.out / REPORT
    if is_complete(report_path, identity):
        say(f"the evaluation in {config.out} is complete already")
        return report_path
    save_options(config, config.out)

    answers: dict[str, ModelAnswers] = {}
    metrics: dict[str, ModelMetrics] = {}
    for candidate in candidates:
        assert engine is not None  # there are models
        answers[candidate.name], metrics[candidate.name] = _run_model(
            config, engine, candidate, eval_sets, identity.get("cache")
        )
    leave_out_for_all([of_model.references for of_model in metrics.values()])
    answers |= {given.name: given.answers for given in predictions}
    num_answers = sum(
        len(answers_N) for of_model in answers.values() for of_set in of_model.values() for answers_N in of_set.values()
    )
    with Progress("scoring", num_answers, "responses") as progress:
        scored_sets = score_sets(config, eval_sets, answers, progress, metrics)
    _warn_of_answers_without_end(config, scored_sets)
    report = build_report(
        config,
        identity,
        eval_sets,
        scored_sets,
        metrics,
        sizes={candidate.name: candidate.source.num_parameters for candidate in candidates},
        in_cache=in_cache,
        in_train_data=in_train_data,
        runs=runs,
    )
    return write_all(config.out, report, scored_sets)


def _warn_of_answers_without_end(config: EvalConfig, scored_sets: Sequence[ScoredSet]) -> None:
    found = False
    for scored in scored_sets:
        reasons = [answer.finish_reason for answers_N in scored.answers_SN for answer in answers_N]
        cut = reasons.count("length")
        if cut > len(reasons) / 2:
            found = True
            say(
                f"model {scored.model}: {cut} of {len(reasons)} answers to {scored.eval_set.name} did not end within "
                f"{config.max_new_tokens} tokens."
            )
    if found:
        say(
            "Raise --max-new-tokens if answers of this length are too short for you. A model whose long answers never "
            "end may not know the end token of its template: make the student with `dpkd init-student "
            "--eos-from-teacher`"
        )


def _run_model(
    config: EvalConfig,
    engine_name: ResolvedEngine,
    candidate: Candidate,
    eval_sets: Sequence[EvalSet],
    cache: str | None,
) -> tuple[ModelAnswers, ModelMetrics]:
    """A model's answers and its perplexity of gold responses, from one engine, and its distance from the teacher."""
    pairs = reference_pairs(config, candidate, eval_sets)
    with LazyEngine(engine_name, candidate, engine_options(config, engine_name, candidate, pairs)) as engine:
        answers = generate_answers(config, engine, candidate, eval_sets)
        references = measure_references(config, candidate, eval_sets, pairs, engine)
    to_teacher = None
    if cache is not None and config.cache_rows > 0:
        to_teacher = measure_to_teacher(config, candidate, cache)
    return answers, ModelMetrics(references, to_teacher)


def _identity(
    config: EvalConfig,
    engine: str | None,
    candidates: Sequence[Candidate],
    eval_sets: Sequence[EvalSet],
    predictions: Sequence[Predictions],
) -> dict[str, Any]:
    """What the report depends on: settings, and models and data by content; no path and no software version."""
    paths = {"model", "data", "cache", "predictions", "train_data", "run"}
    settings = config.model_dump(mode="json", exclude={*paths, *_FREE_OPTIONS})
    return {
        "format_version": FORMAT_VERSION,
        "settings": {**settings, "engine": engine},
        "models": {candidate.name: candidate.identity for candidate in candidates},
        "predictions": {given.name: given.identity for given in predictions},
        "data": {eval_set.name: eval_set.identity for eval_set in eval_sets},
    }
