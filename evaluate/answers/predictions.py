"""Existing answers: JSON lines with a `prediction` each, matched to a set by row order or by `example_id`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpkd.core.errors import UserError
from dpkd.core.identity import file_sha256
from dpkd.core.json_lines import read_json_lines
from dpkd.core.progress import say
from dpkd.core.prompts.examples import is_unicode
from dpkd.evaluate.answers.answers import Answer, ModelAnswers
from dpkd.evaluate.inputs.eval_sets import EvalSet
from dpkd.evaluate.options.eval import EvalConfig

DEFAULT_SEED = 0


@dataclass(frozen=True)
class Predictions:
    """The existing answers under one name; `identity` is the sha256 of each set's file."""

    name: str
    identity: dict[str, str]
    answers: ModelAnswers


def read_predictions(config: EvalConfig, eval_sets: Sequence[EvalSet]) -> list[Predictions]:
    """The predictions of `config`; raises `UserError` for a file that does not match its set and a set without one."""
    names = [eval_set.name for eval_set in eval_sets]
    unclear = [key for key in config.predictions if ":" not in key]
    if unclear and len(names) > 1:
        raise UserError(
            f"it is unclear which set the predictions {unclear[0]!r} answer",
            found=f"{len(names)} sets: {', '.join(names)}",
            where="--predictions",
            advice=f"Give --predictions {unclear[0]}:{names[0]}=FILE for each set",
        )
    files = config.prediction_files()
    if len(config.predictions) > sum(map(len, files.values())):
        raise UserError(
            "two files of predictions answer one set under one name",
            found=", ".join(config.predictions),
            where="--predictions",
            advice="Give each NAME:SET one file",
        )
    if config.predictions and (config.bucket_by, config.bucket_of) == ("tokens", "prediction"):
        raise UserError(
            "buckets by the answers' tokens need answers with known tokens",
            found="predictions, which are text only",
            where="--bucket-by",
            advice="Give --bucket-by words, or --bucket-of reference",
        )
    return [_read_name(name, of_name, eval_sets) for name, of_name in files.items()]


def _read_name(name: str, files: dict[str, str], eval_sets: Sequence[EvalSet]) -> Predictions:
    names = [eval_set.name for eval_set in eval_sets]
    if difference := sorted(set(files) ^ set(names)):
        raise UserError(
            f"the predictions {name!r} do not answer each set once",
            found=", ".join(sorted(files)),
            expected=", ".join(sorted(names)),
            where="--predictions",
            advice=f"Give one --predictions {name}:SET=FILE for each --data; the difference is {', '.join(difference)}",
        )
    answers = {eval_set.name: _read_file(Path(files[eval_set.name]), eval_set) for eval_set in eval_sets}
    identity = {data: file_sha256(Path(file)) for data, file in files.items()}
    return Predictions(name, identity, answers)


def _read_file(path: Path, eval_set: EvalSet) -> dict[int, list[Answer]]:
    by_seed: dict[int, list[tuple[str | None, str]]] = {}
    for line, row in read_json_lines(path):
        if not isinstance(row, dict) or not isinstance(row.get("prediction"), str):
            found = f"keys {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
            raise UserError(
                f"line {line} has no text `prediction`", found=found, where=path,
                advice='Write {"prediction": "the answer"} on each line',
            )  # fmt: skip
        if not is_unicode(row["prediction"]):
            raise UserError(
                f"line {line} has a `prediction` with half a surrogate pair, which no file can hold", where=path,
                advice="Leave it out, or replace it with U+FFFD",
            )  # fmt: skip
        seed = row.get("seed", DEFAULT_SEED)
        if type(seed) is not int or seed < 0:  # true and false are no seeds
            raise UserError(f"line {line} has a `seed` that is not an integer from 0", found=repr(seed), where=path)
        example_id = row.get("example_id")
        by_seed.setdefault(seed, []).append((None if example_id is None else str(example_id), row["prediction"]))
    if not by_seed:
        raise UserError("the file of predictions is empty", where=path, advice="Give a line for each row of the set")
    return {seed: _match(by_seed[seed], seed, path, eval_set) for seed in sorted(by_seed)}


def _match(given: list[tuple[str | None, str]], seed: int, path: Path, eval_set: EvalSet) -> list[Answer]:
    with_id = sum(example_id is not None for example_id, _ in given)
    if with_id not in (0, len(given)):
        raise UserError(
            "some lines have an `example_id` and some have none",
            found=f"{with_id} of {len(given)} with one",
            where=path,
            advice="Give every line one, or none",
        )
    texts = _by_id(given, seed, path, eval_set) if with_id else _by_order(given, seed, path, eval_set)
    return [Answer(example.example_id, text, [], None) for example, text in zip(eval_set.examples, texts, strict=True)]


def _by_order(given: list[tuple[str | None, str]], seed: int, path: Path, eval_set: EvalSet) -> list[str]:
    texts = [text for _, text in given]
    num_examples = len(eval_set.examples)
    a_line_a_row = len({*eval_set.indices}) == num_examples  # else rows are conversations of several questions
    if a_line_a_row and len(texts) == eval_set.num_rows:
        return [texts[index] for index in eval_set.indices]
    if len(texts) == num_examples:
        say(f"{path}: one prediction for each of the {num_examples} evaluated rows, none for the rows left out")
        return texts
    left_out = f" ({num_examples} without those left out)" if num_examples != eval_set.num_rows else ""
    expected = f"{eval_set.num_rows}{left_out}" if a_line_a_row else f"{num_examples} with --turns all"
    raise UserError(
        f"the predictions do not have a line for each row of data {eval_set.name}",
        found=f"{len(texts)} of seed {seed}",
        expected=expected,
        where=path,
        advice="Write one line for each row in the set's order, or give each line its `example_id`",
    )


def _by_id(given: list[tuple[str | None, str]], seed: int, path: Path, eval_set: EvalSet) -> list[str]:
    texts: dict[str | None, str] = {}
    for example_id, text in given:
        if example_id in texts:
            raise UserError(
                f"two lines of seed {seed} have the example_id {example_id!r}", where=path,
                advice="Give each sample of an example its own `seed`",
            )  # fmt: skip
        texts[example_id] = text
    ids = [example.example_id for example in eval_set.examples]
    if missing := [example_id for example_id in ids if example_id not in texts]:
        raise UserError(
            f"{len(missing)} rows of data {eval_set.name} have no prediction of seed {seed}",
            found=f"none for example_id {missing[0]!r}",
            expected=f"all {len(ids)}, such as {ids[0]!r}",
            where=path,
            advice="A row without an `id` has the example_id line-00000001, counted from 1",
        )
    if extra := len(texts) - len(ids):
        say(f"{path}: {extra} predictions are for rows that are not evaluated, and are not used")
    return [texts[example_id] for example_id in ids]
