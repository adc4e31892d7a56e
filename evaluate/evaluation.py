"""One evaluation from options to report: check everything cheap, generate, score, write."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpkd.evaluate.candidates import Candidate, open_candidates
from dpkd.evaluate.config import EvalConfig
from dpkd.evaluate.duplicates import count_duplicates
from dpkd.evaluate.eval_sets import EvalSet, read_eval_sets
from dpkd.evaluate.generation import generate_answers
from dpkd.evaluate.html import html_page
from dpkd.evaluate.markdown import markdown_table
from dpkd.evaluate.named_sets import resolve_sets
from dpkd.evaluate.plot import plot_rouge_by_bucket, require_matplotlib
from dpkd.evaluate.predictions import Predictions, read_predictions
from dpkd.evaluate.report import FORMAT_VERSION, build_report, write_report
from dpkd.evaluate.scoring import score_sets, write_per_example
from dpkd.teacher_cache.engine import resolve_engine
from dpkd.teacher_cache.errors import UserError
from dpkd.teacher_cache.files import write_text
from dpkd.teacher_cache.identity import differences, fingerprint
from dpkd.teacher_cache.progress import Progress, say

# options that change no number: where results go (a folder may move), and how much memory is used
_FREE_OPTIONS = frozenset({"out", "max_num_seqs", "generations", "scoring_processes", "data_dir"})


CountOverlap = Callable[[str, Sequence[Candidate], Sequence[EvalSet]], dict[str, Any]]


def evaluate(config: EvalConfig, count_overlap: CountOverlap | None = None) -> Path:
    """Evaluate the models of `config` on its data; returns the path of `report.json`.

    `count_overlap` looks into the training's cache (`config.cache`), which this room knows nothing of: it is given the
    location, the models and the sets, and returns the cache's fingerprint and the ids of each set's rows that it holds.

    Called again after a kill it generates only what is missing; called again after the end it says so.
    Raises `UserError`, before any model runs, for whatever in the options cannot be used.
    """
    require_matplotlib()
    engine = resolve_engine(config.engine) if config.model else None
    # spelled out, so that the saved options say what was run and equal ones compare equal
    config = config.model_copy(update={"seeds": config.resolved_seeds(), "data": resolve_sets(config)})
    _check_options(config)
    candidates = open_candidates(config)
    eval_sets = read_eval_sets(config, candidates)
    given = read_predictions(config, eval_sets)
    overlap = _count_overlap(config, candidates, eval_sets, count_overlap)
    duplicates = None if config.train_data is None else count_duplicates(config.train_data, eval_sets)
    identity = _identity(config, engine, candidates, eval_sets, given)
    if overlap is not None:
        identity["cache"] = overlap["cache"]
    if duplicates is not None:
        identity["train_data"] = duplicates["train_data"]
    report_path = config.out / "report.json"
    if _is_complete(report_path, identity):
        say(f"the evaluation in {config.out} is complete already")
        return report_path
    _save_options(config)

    answers = {
        candidate.name: generate_answers(config, engine, candidate, eval_sets)
        for candidate in candidates
        if engine is not None
    } | {predictions.name: predictions.answers for predictions in given}
    num_answers = sum(len(found) for answers_of in answers.values() for found in answers_of.values())
    with Progress("scoring", num_answers, "responses") as progress:
        scored_sets = score_sets(config, eval_sets, answers, progress)
    report = build_report(config, identity, fingerprint(identity), eval_sets, scored_sets, overlap, duplicates)
    write_per_example(config.out / "per_example.parquet", scored_sets)
    write_text(config.out / "report.md", markdown_table(report))
    write_text(config.out / "report.html", html_page(report, scored_sets))
    plot_rouge_by_bucket(report, config.out / "rouge_by_bucket.png")
    write_report(report_path, report)
    return report_path


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
    places = {"model", "data", "cache", "predictions", "train_data"}
    settings = config.model_dump(mode="json", exclude={*places, *_FREE_OPTIONS})
    return {
        "format_version": FORMAT_VERSION,
        "settings": {**settings, "engine": engine},
        "models": {candidate.name: candidate.identity for candidate in candidates},
        "predictions": {predictions.name: predictions.identity for predictions in given},
        "data": {eval_set.name: eval_set.identity for eval_set in eval_sets},
    }


def _check_options(config: EvalConfig) -> None:
    """Refuse an output directory that an evaluation with other options has begun to fill."""
    path = config.out / "dpkd.toml"
    if config.out.exists() and not config.out.is_dir():
        raise UserError("the output directory is a file", where=config.out, advice="Give another --out")
    if not path.exists():
        if (config.out / "report.json").exists():
            raise _other_run(config.out, ["report.json is there without the dpkd.toml of its options"])
        return
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"the output directory's options cannot be read: {error}", where=path) from None
    ours = tomllib.loads(config.to_toml())
    for options in (found, ours):
        for key in _FREE_OPTIONS:
            options.pop(key, None)
    if changed := differences(found, ours):
        raise _other_run(config.out, changed)


def _save_options(config: EvalConfig) -> None:
    try:
        write_text(config.out / "dpkd.toml", config.to_toml())
    except OSError as error:
        raise UserError(f"the output directory cannot be written: {error}", where=config.out) from None


def _is_complete(report_path: Path, identity: dict[str, Any]) -> bool:
    """Whether the report is there; raises `UserError` for one of other models or data at the same paths."""
    if not report_path.exists():
        return False
    try:
        found = json.loads(report_path.read_text(encoding="utf-8"))
        theirs = {
            "format_version": found["format_version"],
            "settings": found["settings"],
            **found["identities"],
        }
        same = found["fingerprint"] == fingerprint(identity)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the report cannot be read: {type(error).__name__} {error}",
            where=report_path,
            advice="Delete it to write it again from the answers beside it",
        ) from None
    if not same:
        raise _other_run(report_path.parent, differences(theirs, identity) or ["fingerprint"])
    return True


def _other_run(out: Path, changed: Sequence[str]) -> UserError:
    return UserError(
        "the output directory holds another run",
        found="; ".join(changed),
        where=out,
        advice="Give another --out (with --generations its answers are used again); nothing was overwritten",
    )
