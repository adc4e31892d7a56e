"""The answers to judge, from an evaluation's directory or from predictions, and the questions about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dpkd.core.errors import UserError
from dpkd.core.identity import derive_seed
from dpkd.core.prompts.examples import Example
from dpkd.evaluate.answers.predictions import read_predictions
from dpkd.evaluate.answers.scoring import ScoredSet, answered_set
from dpkd.evaluate.inputs.eval_sets import EvalSet, read_eval_sets
from dpkd.evaluate.inputs.named_sets import resolve_sets
from dpkd.evaluate.judge.questions import JudgePrompt, question_key
from dpkd.evaluate.merge.evaluations import open_evaluation, read_set, scored_set
from dpkd.evaluate.options.judge import JudgeConfig
from dpkd.evaluate.report.provenance import about_models

_ABOUT = ("directory", "files", "fingerprint", "decoding")


@dataclass(frozen=True)
class JudgedSet:
    """One data set: the answers of each model, in the order of the evaluation, and the indices of the judged `rows`.

    `by_prediction`: length buckets go by the answers' own lengths.
    """

    eval_set: EvalSet
    answers: dict[str, ScoredSet]
    rows: list[int]
    by_prediction: bool = False

    @property
    def name(self) -> str:
        """The name of the data set."""
        return self.eval_set.name

    @property
    def examples(self) -> list[Example]:
        """The judged rows."""
        return [self.eval_set.examples[row] for row in self.rows]

    def bucket_SN(self, model: str) -> np.ndarray:
        """The length bucket of each judged answer of `model`."""
        return self.answers[model].bucket_SN[:, self.rows]


@dataclass(frozen=True)
class Answers:
    """All answers that can be judged; `identity` is by content.

    `about` has the origin of each model's answers: directory or files, fingerprint, decoding.
    """

    sets: list[JudgedSet]
    identity: dict[str, Any]
    about: dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One question about the answer of `model` to `row`, or about it and that of `other`.

    `parts` are the task and the texts to judge, by placeholder of `prompt`. `swapped`: the answer of `model` comes
    second, as B. `key` identifies the question by content.
    """

    data: str
    row: Example
    model: str
    seed: int
    other: str | None
    other_seed: int | None
    swapped: bool
    prompt: JudgePrompt
    parts: dict[str, str]
    key: str = ""

    def text(self) -> str:
        """The text that the judge reads."""
        return self.prompt.render(self.parts, self.row.references)


def read_answers(config: JudgeConfig) -> Answers:
    """All answers of the report or the predictions in `config`; raises `UserError` if they cannot be read."""
    return _from_predictions(config) if config.report is None else _from_report(config.report)


def choose(answers: Answers, config: JudgeConfig) -> list[JudgedSet]:
    """The models, sets, rows and seeds to judge; raises `UserError` for an unknown name."""
    names = list(dict.fromkeys(model for found in answers.sets for model in found.answers))
    _check_known(config.only, names, "model", "--only")
    _check_known(config.sets, [found.name for found in answers.sets], "data set", "--sets")
    models = [name for name in names if name in config.only or not config.only]
    if config.baseline is not None:
        _check_known((config.baseline,), models, "model", "--baseline")
    if config.mode == "pairwise" and len(models) < 2:
        raise UserError(
            "pairs need two models", found=", ".join(models), where="--mode", advice="Give --mode pointwise"
        )
    chosen = [_chosen(found, models, config) for found in answers.sets if found.name in config.sets or not config.sets]
    chosen = [judged for judged in chosen if judged.answers]
    if not chosen:
        raise UserError(
            "the chosen models have not answered the chosen data sets",
            found=", ".join(config.sets),
            where=f"--only {','.join(config.only)}",
            advice="Leave out --only or --sets",
        )
    return chosen


def _check_known(given: Sequence[str], known: Sequence[str], what: str, where: str) -> None:
    for name in given:
        if name not in known:
            raise UserError(
                f"there is no {what} of this name", found=repr(name), expected=", ".join(known), where=where
            )


def _chosen(judged: JudgedSet, models: Sequence[str], config: JudgeConfig) -> JudgedSet:
    rows = judged.rows[: config.limit]
    if config.sample is not None:
        # the smallest draws: a larger sample includes a smaller one
        examples = judged.eval_set.examples
        rows = sorted(rows, key=lambda row: _draw(config.seed, judged.name, examples[row].example_id))
        rows = sorted(rows[: config.sample])
    answers = {model: found for model, found in judged.answers.items() if model in models}
    if config.answer_seeds == "first":
        answers = {model: _first_seed(found) for model, found in answers.items()}
    return replace(judged, answers=answers, rows=rows)


def _first_seed(scored: ScoredSet) -> ScoredSet:
    parts = {name: getattr(scored, name)[:1] for name in ("seeds", "prompts_SN", "answers_SN", "bucket_SN")}
    return replace(scored, **parts, scores={})


def _draw(seed: int, data: str, example_id: str) -> int:
    """64 bits for one row, which do not depend on other rows or their order."""
    return derive_seed(seed, data, example_id, bits=64)


def compared(models: Sequence[str], baseline: str | None) -> list[tuple[str, str]]:
    """Which models to compare, as (model, baseline): each model with all before it, or all with `baseline`.

    A set that the baseline has not answered has no comparison.
    """
    if baseline is not None:
        return [(model, baseline) for model in models if model != baseline and baseline in models]
    return [(model, other) for other, model in combinations(models, 2)]


def make_questions(sets: Sequence[JudgedSet], config: JudgeConfig, prompt: JudgePrompt) -> Iterator[Question]:
    """Every question, row by row: questions about one row start with the same text, which servers cache.

    Raises `UserError` if two models of a pair have different numbers of answers.
    """
    for judged in sets:
        models = [*judged.answers]
        pairs: Sequence[tuple[str, str | None]] = [(model, None) for model in models]
        if config.mode == "pairwise":
            pairs = _checked(judged, compared(models, config.baseline))
        for row in judged.rows:
            for question in _of_row(judged, row, pairs, config, prompt):
                yield replace(question, key=question_key(prompt.form, question.text()))


def _of_row(
    judged: JudgedSet, row: int, pairs: Sequence[tuple[str, str | None]], config: JudgeConfig, prompt: JudgePrompt
) -> Iterator[Question]:
    example = judged.eval_set.examples[row]
    # one draw for all models, so that the reference comes first for all or for none
    reference_first = prompt.form == "scores" and _draw(config.seed, judged.name, example.example_id) % 2 == 1
    for model, other in pairs:
        ours, theirs = judged.answers[model], None if other is None else judged.answers[other]
        for index, seed in enumerate(ours.seeds):
            answer, other_seed = ours.answers_SN[index][row].answer, None
            against, orders = example.references[0], [reference_first]
            if theirs is not None:
                against, orders = theirs.answers_SN[index][row].answer, [False, True]
                other_seed = theirs.seeds[index]
            for swapped in orders:
                first, second = (against, answer) if swapped else (answer, against)
                texts = {"answer": answer} if prompt.form == "score" else {"answer_a": first, "answer_b": second}
                parts = {"instruction": ours.prompts_SN[index][row], **texts}
                yield Question(judged.name, example, model, seed, other, other_seed, swapped, prompt, parts)


def _checked(judged: JudgedSet, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    for model, other in pairs:
        ours, theirs = (len(judged.answers[name].seeds) for name in (model, other))
        if ours != theirs:
            raise UserError(
                f"the models {model} and {other} have different numbers of answers to a row of data {judged.name}",
                found=f"{ours} and {theirs}",
                where="--answer-seeds all",
                advice="Give --answer-seeds first",
            )
    return pairs


def _from_report(folder: Path) -> Answers:
    evaluation = open_evaluation(str(folder))
    report, sets = evaluation.report, []
    try:
        about = {name: {key: model[key] for key in _ABOUT} for name, model in report["models"].items()}
        settings = report["settings"]
        for data, about_data in report["data"].items():
            models = {name: evaluation.rows(name, data) for name in about if data in report["models"][name]["data"]}
            first = next(iter(models.values()))
            ids = list(next(iter(first.values())))
            eval_set = read_set(first, data, about_data, ids, settings["rouge_tokenizer"])
            found = {name: scored_set(rows, name, eval_set) for name, rows in models.items()}
            sets.append(JudgedSet(eval_set, found, list(range(len(ids))), settings["bucket_of"] == "prediction"))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"the evaluation cannot be read: {type(error).__name__} {error}",
            where=folder,
            advice="Delete its report.json and run `dpkd eval` again: the answers are kept",
        ) from None
    return Answers(sets, {"per_example": evaluation.rows_sha256}, about)


def _from_predictions(config: JudgeConfig) -> Answers:
    options = config.eval_config()
    options = options.model_copy(update={"data": resolve_sets(options)})
    eval_sets = read_eval_sets(options, [])
    predictions = read_predictions(options, eval_sets)
    sets = []
    for eval_set in eval_sets:
        found = {one.name: answered_set(options, eval_set, one.name, one.answers[eval_set.name]) for one in predictions}
        sets.append(JudgedSet(eval_set, found, list(range(len(eval_set.examples)))))
    identity = {
        "predictions": {one.name: one.identity for one in predictions},
        "data": {eval_set.name: eval_set.identity for eval_set in eval_sets},
    }
    about = about_models(options, {"settings": {}, **identity})
    return Answers(sets, identity, {name: {key: model[key] for key in _ABOUT} for name, model in about.items()})
