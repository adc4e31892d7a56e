"""The answers to judge, from an evaluation's directory or from predictions, and the questions about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.identity import derive_seed
from dpkd.core.prompts.thinking import without_thinking
from dpkd.evaluate.judge.questions import JudgePrompt, question_key
from dpkd.evaluate.merge.evaluations import open_evaluation
from dpkd.evaluate.metrics.buckets import bucket_index, buckets_of
from dpkd.evaluate.options.judge import JudgeConfig
from dpkd.evaluate.report.provenance import about_models

_COLUMNS = ["model", "data", "seed", "example_id", "bucket", "prompt", "references", "response"]
_ABOUT = ("directory", "files", "fingerprint", "decoding")


@dataclass(frozen=True)
class JudgedRow:
    """One example: its references and, by model, the prompt, and the answers and their length buckets by seed."""

    example_id: str
    references: tuple[str, ...]
    prompts: dict[str, str]
    answers: dict[str, dict[int, str]]
    buckets: dict[str, dict[int, str]]


@dataclass(frozen=True)
class JudgedSet:
    """One data set: the judged `rows` in file order, out of `num_rows`; `edges` of its length buckets."""

    name: str
    rows: list[JudgedRow]
    edges: tuple[int, ...]
    num_rows: int

    @property
    def models(self) -> tuple[str, ...]:
        """The models in the order of the evaluation."""
        return tuple(self.rows[0].answers)

    def seeds(self, model: str) -> tuple[int, ...]:
        """The seeds of a model's answers, in the order of the evaluation."""
        return tuple(self.rows[0].answers[model])


@dataclass(frozen=True)
class Answers:
    """All answers that can be judged; `identity` is by content.

    `about` has the origin of each model's answers: directory or files, fingerprint, decoding. `by_prediction`: buckets
    go by the answers' own lengths.
    """

    sets: list[JudgedSet]
    identity: dict[str, Any]
    about: dict[str, Any]
    by_prediction: bool = False


@dataclass(frozen=True)
class Question:
    """One question about the answer of `model` to `row`, or about it and that of `other`.

    `swapped`: the answer of `model` comes second, as B. `key` identifies the question by content.
    """

    data: str
    row: JudgedRow
    model: str
    seed: int
    other: str | None
    other_seed: int | None
    swapped: bool
    prompt: JudgePrompt
    key: str = ""

    def text(self) -> str:
        """The text that the judge reads."""
        parts = {"instruction": self.row.prompts[self.model]}
        ours = self.row.answers[self.model][self.seed]
        if self.prompt.form == "score":
            return self.prompt.render(parts | {"answer": ours}, self.row.references)
        if self.other is None:
            theirs = self.row.references[0]
        else:
            assert self.other_seed is not None
            theirs = self.row.answers[self.other][self.other_seed]
        first, second = (theirs, ours) if self.swapped else (ours, theirs)
        return self.prompt.render(parts | {"answer_a": first, "answer_b": second}, self.row.references)


def read_answers(config: JudgeConfig) -> Answers:
    """All answers of the report or the predictions in `config`; raises `UserError` if they cannot be read."""
    return _from_predictions(config) if config.report is None else _from_report(config.report)


def choose(answers: Answers, config: JudgeConfig) -> list[JudgedSet]:
    """The models, sets, rows and seeds to judge; raises `UserError` for an unknown name."""
    names = list(dict.fromkeys(model for found in answers.sets for model in found.models))
    _check_known(config.only, names, "model", "--only")
    _check_known(config.sets, [found.name for found in answers.sets], "data set", "--sets")
    models = [name for name in names if name in config.only or not config.only]
    if config.baseline is not None:
        _check_known((config.baseline,), models, "model", "--baseline")
    if config.mode == "pairwise" and len(models) < 2:
        raise UserError(
            "pairs need two models", found=", ".join(models), where="--mode", advice="Give --mode pointwise"
        )
    return [
        _choose_rows(found, models, config) for found in answers.sets if found.name in config.sets or not config.sets
    ]


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
        pairs = compared(judged.models, config.baseline)
        if config.mode == "pairwise":
            _check_seeds(judged, pairs)
        for row in judged.rows:
            bare: list[Question] = []
            if config.mode == "pairwise":
                for model, other in pairs:
                    for seed, other_seed in zip(judged.seeds(model), judged.seeds(other), strict=True):
                        for swapped in (False, True):
                            bare.append(Question(judged.name, row, model, seed, other, other_seed, swapped, prompt))
            else:
                # one draw for all models, so that the reference comes first for all or for none
                swapped = prompt.form == "scores" and _draw(config.seed, judged.name, row.example_id) % 2 == 1
                for model in judged.models:
                    for seed in judged.seeds(model):
                        bare.append(Question(judged.name, row, model, seed, None, None, swapped, prompt))
            for question in bare:
                yield replace(question, key=question_key(prompt.form, question.text()))


def _from_report(folder: Path) -> Answers:
    evaluation = open_evaluation(str(folder))
    report = evaluation.report
    try:
        edges = {data: tuple(about["edges"]) for data, about in report["data"].items()}
        about = {name: {key: model[key] for key in _ABOUT} for name, model in report["models"].items()}
        by_prediction = report["settings"]["bucket_of"] == "prediction"
    except (KeyError, TypeError) as error:
        raise UserError(
            f"the evaluation cannot be read: {type(error).__name__} {error}",
            where=folder,
            advice="Delete its report.json and run `dpkd eval` again: the answers are kept",
        ) from None
    by_set: dict[str, dict[str, JudgedRow]] = {data: {} for data in edges}
    for row in evaluation.table.select(_COLUMNS).to_pylist():
        fresh = JudgedRow(row["example_id"], tuple(row["references"]), {}, {}, {})
        judged = by_set[row["data"]].setdefault(row["example_id"], fresh)
        judged.prompts[row["model"]] = row["prompt"]
        judged.answers.setdefault(row["model"], {})[row["seed"]] = without_thinking(row["response"])
        judged.buckets.setdefault(row["model"], {})[row["seed"]] = row["bucket"]
    sets = [JudgedSet(data, list(rows.values()), edges[data], len(rows)) for data, rows in by_set.items()]
    return Answers(sets, {"per_example": evaluation.rows_sha256}, about, by_prediction)


def _from_predictions(config: JudgeConfig) -> Answers:
    from dpkd.evaluate.answers.predictions import read_predictions
    from dpkd.evaluate.inputs.eval_sets import read_eval_sets
    from dpkd.evaluate.inputs.named_sets import resolve_sets

    options = config.eval_config()
    options = options.model_copy(update={"data": resolve_sets(options)})
    eval_sets = read_eval_sets(options, [])
    predictions = read_predictions(options, eval_sets)
    sets = []
    for eval_set in eval_sets:
        labels = [bucket.label for bucket in buckets_of(eval_set.edges)]
        rows = []
        for index, example in enumerate(eval_set.examples):
            label = labels[bucket_index(eval_set.lengths[index], eval_set.edges)]
            answers: dict[str, dict[int, str]] = {one.name: {} for one in predictions}
            for one in predictions:
                for (data, seed), answers_N in one.answers.items():
                    if data == eval_set.name:
                        answers[one.name][seed] = answers_N[index].answer
            prompts = {name: eval_set.prompt_text(name, index) for name in answers}
            buckets = {name: dict.fromkeys(by_seed, label) for name, by_seed in answers.items()}
            rows.append(JudgedRow(example.example_id, tuple(example.references), prompts, answers, buckets))
        sets.append(JudgedSet(eval_set.name, rows, eval_set.edges, len(rows)))
    identity = {
        "predictions": {one.name: one.identity for one in predictions},
        "data": {eval_set.name: eval_set.identity for eval_set in eval_sets},
    }
    about = about_models(options, {"settings": {}, **identity})
    return Answers(sets, identity, {name: {key: model[key] for key in _ABOUT} for name, model in about.items()})


def _check_known(given: Sequence[str], known: Sequence[str], what: str, where: str) -> None:
    for name in given:
        if name not in known:
            raise UserError(
                f"there is no {what} of this name", found=repr(name), expected=", ".join(known), where=where
            )


def _choose_rows(judged: JudgedSet, models: Sequence[str], config: JudgeConfig) -> JudgedSet:
    rows = judged.rows[: config.limit]
    if config.sample is not None and config.sample < len(rows):
        # the smallest draws: a larger sample includes a smaller one
        drawn = sorted(rows, key=lambda row: _draw(config.seed, judged.name, row.example_id))[: config.sample]
        kept = {row.example_id for row in drawn}
        rows = [row for row in rows if row.example_id in kept]
    num_seeds = 1 if config.answer_seeds == "first" else None

    def chosen(answers: dict[str, dict[int, str]]) -> dict[str, dict[int, str]]:
        return {model: dict(islice(found.items(), num_seeds)) for model, found in answers.items() if model in models}

    return replace(judged, rows=[replace(row, answers=chosen(row.answers)) for row in rows])


def _draw(seed: int, data: str, example_id: str) -> int:
    """64 bits for one row, which do not depend on other rows or their order."""
    return derive_seed(seed, data, example_id, bits=64)


def _check_seeds(judged: JudgedSet, pairs: Sequence[tuple[str, str]]) -> None:
    for model, other in pairs:
        ours, theirs = len(judged.seeds(model)), len(judged.seeds(other))
        if ours != theirs:
            raise UserError(
                f"the models {model} and {other} have different numbers of answers to a row of data {judged.name}",
                found=f"{ours} and {theirs}",
                where="--answer-seeds all",
                advice="Give --answer-seeds first",
            )
