"""One evaluation from options to report: check everything cheap, generate, score, write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.identity import fingerprint
from dpkd.core.progress import Progress, say
from dpkd.evaluate.answers.generation import generate_answers
from dpkd.evaluate.answers.perplexity import ModelMeasures, OpenModel, measure_models
from dpkd.evaluate.answers.predictions import Predictions, read_predictions
from dpkd.evaluate.answers.scoring import score_sets
from dpkd.evaluate.inputs.contamination import count_duplicates
from dpkd.evaluate.inputs.eval_sets import EvalSet, read_eval_sets
from dpkd.evaluate.inputs.models import Candidate, open_candidates
from dpkd.evaluate.inputs.named_sets import resolve_sets
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.evaluate.report.build import FORMAT_VERSION, build_report
from dpkd.evaluate.report.curves import read_run, run_identity, run_places
from dpkd.evaluate.views.output import REPORT, check_options, is_complete, save_options, write_all
from dpkd.evaluate.views.plots import require_matplotlib
from dpkd.teacher_cache.engines.engine import resolve_engine

# options that change no number: where results go (a folder may move), and how much memory is used
_FREE_OPTIONS = frozenset({"out", "max_num_seqs", "generations", "data_dir"})


CountOverlap = Callable[[str, Sequence[Candidate], Sequence[EvalSet]], dict[str, Any]]


def evaluate(
    config: EvalConfig, count_overlap: CountOverlap | None = None, open_model: OpenModel | None = None
) -> Path:
    """Evaluate the models of `config` on its data; returns the path of `report.json`.

    `count_overlap` looks into the training's cache (`config.cache`), which this room knows nothing of: it is given the
    location, the models and the sets, and returns the cache's fingerprint and the ids of each set's rows that it holds.
    `open_model` measures a model itself: perplexity, and its divergence from the cache's teacher. Without it
    neither is measured, whatever the options say, and the report has nulls.

    Called again after a kill it generates only what is missing; called again after the end it says so.
    Raises `UserError`, before any model runs, for whatever in the options cannot be used.
    """
    require_matplotlib()
    engine = resolve_engine(config.engine) if config.model else None
    # spelled out, so that the saved options say what was run and equal ones compare equal
    config = config.model_copy(update={"seeds": config.resolved_seeds(), "data": resolve_sets(config)})
    if open_model is None:
        config = config.model_copy(update={"perplexity": False, "cache_rows": 0})
    check_options(config, config.out, _FREE_OPTIONS)
    candidates = open_candidates(config)
    eval_sets = read_eval_sets(config, candidates)
    given = read_predictions(config, eval_sets)
    overlap = _count_overlap(config, candidates, eval_sets, count_overlap)
    duplicates = None if config.train_data is None else count_duplicates(config.train_data, eval_sets)
    places = run_places(config)
    runs = {name: read_run(name, place) for name, place in places.items()}
    identity = _identity(config, engine, candidates, eval_sets, given)
    if overlap is not None:
        identity["cache"] = overlap["cache"]
    if duplicates is not None:
        identity["train_data"] = duplicates["train_data"]
    if places:
        identity["runs"] = {name: run_identity(place) for name, place in places.items()}
    report_path = config.out / REPORT
    if is_complete(report_path, identity):
        say(f"the evaluation in {config.out} is complete already")
        return report_path
    save_options(config, config.out)

    answers = {
        candidate.name: generate_answers(config, engine, candidate, eval_sets)
        for candidate in candidates
        if engine is not None
    } | {predictions.name: predictions.answers for predictions in given}
    measures: dict[str, ModelMeasures] = {}
    if open_model is not None:
        measures = measure_models(config, candidates, eval_sets, open_model, identity.get("cache"))
    num_answers = sum(len(found) for answers_of in answers.values() for found in answers_of.values())
    with Progress("scoring", num_answers, "responses") as progress:
        scored_sets = score_sets(config, eval_sets, answers, progress, measures)
    report = build_report(
        config, identity, fingerprint(identity), eval_sets, scored_sets, overlap, duplicates, runs, measures
    )
    return write_all(config.out, report, scored_sets)


def _count_overlap(
    config: EvalConfig,
    candidates: Sequence[Candidate],
    eval_sets: Sequence[EvalSet],
    count_overlap: CountOverlap | None,
) -> dict[str, Any] | None:
    if config.cache is None:
        return None
    if count_overlap is None:
        raise UserError("option 'cache' needs the function that reads it", advice="Use `dpkd eval --cache`")
    if not candidates:
        raise UserError(
            "prompts are compared with a cache by a model's tokenizer, and there is no model",
            where="--cache",
            advice="Give --model too, or --train-data with the rows behind the cache",
        )
    return count_overlap(config.cache, candidates, eval_sets)


def _identity(
    config: EvalConfig,
    engine: str | None,
    candidates: Sequence[Candidate],
    eval_sets: Sequence[EvalSet],
    given: Sequence[Predictions],
) -> dict[str, Any]:
    """What the report is a function of: settings, and models and data by content; no path and no software."""
    places = {"model", "data", "cache", "predictions", "train_data", "run"}
    settings = config.model_dump(mode="json", exclude={*places, *_FREE_OPTIONS})
    return {
        "format_version": FORMAT_VERSION,
        "settings": {**settings, "engine": engine},
        "models": {candidate.name: candidate.identity for candidate in candidates},
        "predictions": {predictions.name: predictions.identity for predictions in given},
        "data": {eval_set.name: eval_set.identity for eval_set in eval_sets},
    }
