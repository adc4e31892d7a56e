"""Answers of one model to every data set with every seed, from one engine start, resumed answer by answer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.identity import fingerprint
from dpkd.core.progress import Progress, say
from dpkd.evaluate.answers.answers import Answer, PartialAnswers, answers_path, read_answers, write_answers
from dpkd.evaluate.inputs.eval_sets import EvalSet
from dpkd.evaluate.inputs.models import Candidate
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.teacher_cache.engines.engine import (
    EngineResult,
    GenerateRequest,
    ResolvedEngine,
    Sampling,
    open_engine,
    results_only,
)

# part of every fingerprint: raised when the same inputs would be answered otherwise
_FORMAT_VERSION = 1


@dataclass
class _File:
    """One answers file: what it must hold, and what has come in so far."""

    eval_set: EvalSet
    seed: int
    path: Path
    fingerprint: str
    partial: PartialAnswers
    answers: list[Answer | None] = field(default_factory=list)

    @property
    def num_missing(self) -> int:
        return sum(answer is None for answer in self.answers)


def request_seed(seed: int, example_id: str) -> int:
    """The seed of one request, below 2**31: a pure function of the evaluation's seed and the example.

    So the draw of an answer does not depend on the other rows, their order, or where a run was resumed. The
    model's probabilities do, by rounding: an engine adds up another batch in another order, and a sampled answer
    may then take another token where two are nearly as likely. Finished files are kept as they are.
    """
    digest = hashlib.sha256(f"{seed}\0{example_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 2**31


def generate_answers(
    config: EvalConfig,
    engine: ResolvedEngine,
    candidate: Candidate,
    eval_sets: Sequence[EvalSet],
) -> dict[tuple[str, int], list[Answer]]:
    """The answers of `candidate` by (data set, seed), in the order of the set's examples.

    Answers that the same inputs made are reused; the engine starts only for what is missing. Each answer is kept as it
    comes in, and a file is written with its last: a killed run repeats the answers then under way alone. Raises
    `UserError` when the engine cannot start, and for a shared directory of answers that other inputs made.
    """
    sampling = Sampling(
        config.temperature, config.top_p, config.max_new_tokens, tuple(candidate.source.stop_token_ids())
    )
    files = _open_files(config, engine, candidate, eval_sets, sampling)
    num_total = sum(len(file.answers) for file in files)
    num_missing = sum(file.num_missing for file in files)
    if num_missing == 0:
        say(f"model {candidate.name}: all {num_total} responses are there already")
    else:
        say(f"model {candidate.name}: starting {engine} for {num_missing} responses")
        with (
            open_engine(engine, candidate.source, config.engine_options()) as running,
            Progress(f"model {candidate.name}", num_total, "responses", done=num_total - num_missing) as progress,
        ):
            places = [(file, row) for file in files for row, found in enumerate(file.answers) if found is None]
            for result in results_only(running.generate(_requests(places, candidate.name), sampling)):
                file, row = places[result.index]
                _take(file, row, result, candidate)
                progress.advance()
    return {(file.eval_set.name, file.seed): _complete(file) for file in files}


def _open_files(
    config: EvalConfig,
    engine: str,
    candidate: Candidate,
    eval_sets: Sequence[EvalSet],
    sampling: Sampling,
) -> list[_File]:
    files = []
    for eval_set in eval_sets:
        example_ids = [example.example_id for example in eval_set.examples]
        made_by: dict[str, Any] = {
            "format_version": _FORMAT_VERSION,
            "engine": engine,
            **candidate.identity,
            "data": eval_set.identity,
            "sampling": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_new_tokens": sampling.max_new_tokens,
                "stop_token_ids": list(sampling.stop_token_ids),
            },
            "prompts": [
                [example_id, prompt.ids]
                for example_id, prompt in zip(example_ids, eval_set.prompts[candidate.name], strict=True)
            ],
        }
        shared = fingerprint(made_by)
        for seed in config.resolved_seeds():
            path = answers_path(config.generations_dir(), candidate.name, eval_set.name, seed)
            made_by_all = fingerprint({"shared": shared, "seed": seed})
            file = _File(eval_set, seed, path, made_by_all, PartialAnswers(path, made_by_all))
            found = read_answers(path, file.fingerprint, example_ids)
            if found is None and config.generations is not None and path.exists():
                raise UserError(
                    "the directory of shared answers holds a file that other inputs made",
                    where=path,
                    advice="Give another --generations, or the model another name; nothing was overwritten",
                )
            file.answers = file.partial.read(example_ids) if found is None else list(found)
            if found is None and file.num_missing == 0:
                _write(file)  # killed between the last answer and its file
            files.append(file)
    return files


def _requests(places: Sequence[tuple[_File, int]], model: str) -> Iterator[GenerateRequest]:
    for index, (file, row) in enumerate(places):
        yield GenerateRequest(
            index,
            file.eval_set.prompts[model][row].ids,
            request_seed(file.seed, file.eval_set.examples[row].example_id),
        )


def _take(file: _File, row: int, result: EngineResult, candidate: Candidate) -> None:
    assert file.answers[row] is None, "the engine answered a request twice"
    response_ids = [int(token) for token in result.response_ids]
    answer = Answer(
        file.eval_set.examples[row].example_id,
        candidate.encoder.decode(response_ids),
        response_ids,
        result.finish_reason,
    )
    file.answers[row] = answer
    file.partial.append(answer)
    if file.num_missing == 0:
        _write(file)


def _write(file: _File) -> None:
    write_answers(file.path, _complete(file), file.fingerprint)
    file.partial.discard()


def _complete(file: _File) -> list[Answer]:
    answers = [answer for answer in file.answers if answer is not None]
    assert len(answers) == len(file.answers), "the engine left requests unanswered"
    return answers
