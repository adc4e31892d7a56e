"""The answers to judge, from an evaluation's directory or from files of predictions, and the questions about them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.identity import derive_seed, file_sha256
from dpkd.evaluate.judge.questions import JudgePrompt, question_key
from dpkd.evaluate.metrics.buckets import bucket_index, buckets_of
from dpkd.evaluate.options.judge import JudgeConfig
from dpkd.evaluate.report.provenance import about_models

_COLUMNS = ["model", "data", "seed", "example_id", "bucket", "prompt", "references", "response"]
_ABOUT = ("directory", "files", "fingerprint", "decoding")


@dataclass(frozen=True)
class JudgedRow:
    """One example: its references and, by model, the prompt, the answers by seed and the length bucket of each."""

    example_id: str
    references: tuple[str, ...]
    prompts: dict[str, str]
    answers: dict[str, dict[int, str]]
    buckets: dict[str, dict[int, str]]


@dataclass(frozen=True)
class JudgedSet:
    """One data set: `rows` in file order of the `num_rows` that there are, `edges` of its length buckets."""

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
    """Everything that may be judged; `identity` is by content, `by_prediction` says that each answer has its bucket.

    `about` says of each model where its answers are from: directory or files, fingerprint, decoding.
    """

    sets: list[JudgedSet]
    identity: dict[str, Any]
    about: dict[str, Any]
    by_prediction: bool = False


@dataclass(frozen=True)
class Question:
    """One question about the answer of `model` to `row`, or about it and that of `other`.

    `swapped` is whether the answer of `model` stands second, as B; `key` names the question by content.
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
        """What the judge reads."""
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
    """The answers that `config` names, before anything is chosen; raises `UserError` for what cannot be read."""
    return _from_predictions(config) if config.report is None else _from_report(config.report)


def choose(answers: Answers, config: JudgeConfig) -> list[JudgedSet]:
    """The models, sets, rows and seeds to judge; raises `UserError` for a name that is not there."""
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
    """Which models are compared, as (model, the one that it is held against): each later one with each before it.

    A set that the baseline has not answered has no comparison.
    """
    if baseline is not None:
        return [(model, baseline) for model in models if model != baseline and baseline in models]
    return [(model, other) for other, model in combinations(models, 2)]


def make_questions(sets: Sequence[JudgedSet], config: JudgeConfig, prompt: JudgePrompt) -> Iterator[Question]:
    """Every question, row by row: questions about one row have a beginning in common, which servers keep.

    Raises `UserError` where two models of a pair have different numbers of answers.
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
                # one draw for all models, so that they are compared with the reference at the same place
                swapped = prompt.form == "scores" and _draw(config.seed, judged.name, row.example_id) % 2 == 1
                for model in judged.models:
                    for seed in judged.seeds(model):
                        bare.append(Question(judged.name, row, model, seed, None, None, swapped, prompt))
            for question in bare:
                yield replace(question, key=question_key(prompt.form, question.text()))


def _from_report(folder: Path) -> Answers:
    import pyarrow.parquet as pq

    path = folder / "per_example.parquet"
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        rows = pq.read_table(path, columns=_COLUMNS).to_pylist()
        edges = {data: tuple(about["edges"]) for data, about in report["data"].items()}
        by_prediction = report["settings"].get("bucket_of") == "prediction"
        about = {name: {key: model[key] for key in _ABOUT} for name, model in report["models"].items()}
    except FileNotFoundError as error:
        raise UserError(
            "the directory holds no finished evaluation",
            found=f"no {Path(error.filename or str(path)).name}",
            where=folder,
            advice="Give the --out of a `dpkd eval` that has ended",
        ) from None
    except (ValueError, KeyError, TypeError, OSError) as error:  # pyarrow's errors are among them
        raise UserError(
            f"the evaluation cannot be read: {type(error).__name__} {error}",
            where=folder,
            advice="One that an older dpkd has written is to be made again; its answers are used again",
        ) from None
    by_set: dict[str, dict[str, JudgedRow]] = {data: {} for data in edges}
    for row in rows:
        fresh = JudgedRow(row["example_id"], tuple(row["references"]), {}, {}, {})
        found = by_set[row["data"]].setdefault(row["example_id"], fresh)
        found.prompts[row["model"]] = row["prompt"]
        found.answers.setdefault(row["model"], {})[row["seed"]] = row["response"]
        found.buckets.setdefault(row["model"], {})[row["seed"]] = row["bucket"]
    sets = [JudgedSet(data, list(found.values()), edges[data], len(found)) for data, found in by_set.items()]
    for judged in sets:
        _check_whole(judged, path)
    return Answers(sets, {"per_example": file_sha256(path)}, about, by_prediction)


def _check_whole(judged: JudgedSet, path: Path) -> None:
    shapes = {tuple((model, tuple(by_seed)) for model, by_seed in row.answers.items()) for row in judged.rows}
    if len(shapes) != 1:
        raise UserError(
            f"the evaluation does not hold each row of data {judged.name} once for each model and seed",
            found=f"{len(shapes)} different sets of answers",
            where=path,
            advice="Run `dpkd eval` again",
        )


def _from_predictions(config: JudgeConfig) -> Answers:
    from dpkd.evaluate.answers.predictions import read_predictions
    from dpkd.evaluate.inputs.eval_sets import read_eval_sets
    from dpkd.evaluate.inputs.named_sets import resolve_sets

    options = config.eval_config()
    options = options.model_copy(update={"data": resolve_sets(options)})
    eval_sets = read_eval_sets(options, [])
    given = read_predictions(options, eval_sets)
    sets = []
    for eval_set in eval_sets:
        labels = [bucket.label for bucket in buckets_of(eval_set.edges)]
        answers = {
            found.name: {seed: texts for (data, seed), texts in found.answers.items() if data == eval_set.name}
            for found in given
        }
        rows = []
        for place, example in enumerate(eval_set.examples):
            label = labels[bucket_index(eval_set.lengths[place], eval_set.edges)]
            by_model = {
                name: {seed: texts[place].response for seed, texts in by.items()} for name, by in answers.items()
            }
            rows.append(
                JudgedRow(
                    example.example_id,
                    tuple(example.references),
                    {name: eval_set.prompt_text(name, place) for name in answers},
                    by_model,
                    {name: dict.fromkeys(by_seed, label) for name, by_seed in by_model.items()},
                )
            )
        sets.append(JudgedSet(eval_set.name, rows, eval_set.edges, len(rows)))
    identity = {
        "predictions": {found.name: found.identity for found in given},
        "data": {eval_set.name: eval_set.identity for eval_set in eval_sets},
    }
    about = about_models(options, {"settings": {}, **identity})
    return Answers(sets, identity, {name: {key: model[key] for key in _ABOUT} for name, model in about.items()})


def _check_known(given: Sequence[str], known: Sequence[str], what: str, where: str) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"no such {what}", found=repr(name), expected=", ".join(known), where=where)


def _choose_rows(judged: JudgedSet, models: Sequence[str], config: JudgeConfig) -> JudgedSet:
    rows = judged.rows[: config.limit]
    if config.sample is not None and config.sample < len(rows):
        # the smallest draws: a larger sample holds a smaller one
        drawn = sorted(rows, key=lambda row: _draw(config.seed, judged.name, row.example_id))[: config.sample]
        kept = {row.example_id for row in drawn}
        rows = [row for row in rows if row.example_id in kept]
    num_seeds = 1 if config.answer_seeds == "first" else None
    return replace(
        judged,
        rows=[
            replace(
                row,
                answers={
                    model: dict(list(by_seed.items())[:num_seeds])
                    for model, by_seed in row.answers.items()
                    if model in models
                },
            )
            for row in rows
        ],
    )


def _draw(seed: int, data: str, example_id: str) -> int:
    """64 bits for one row: a pure function, so other rows and their order do not change it."""
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
