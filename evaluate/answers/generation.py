"""The answers of one model to every data set with every seed, from one engine, resumed answer by answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from dpkd.core.errors import UserError
from dpkd.core.identity import derive_seed, fingerprint
from dpkd.core.json_lines import AppendOnlyLines
from dpkd.core.progress import Progress, say
from dpkd.evaluate.answers.answers import (
    Answer,
    ModelAnswers,
    answers_path,
    partial_answers,
    read_answers,
    write_answers,
)
from dpkd.evaluate.inputs.eval_sets import EvalSet
from dpkd.evaluate.inputs.models import Candidate
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.teacher_cache.engines.engine import (
    Engine,
    EngineOptions,
    EngineResult,
    GenerateRequest,
    ResolvedEngine,
    Sampling,
    results_only,
)
from dpkd.teacher_cache.engines.open import open_engine

# part of every fingerprint: increment it when the same inputs would give other answers
_FORMAT_VERSION = 1


class LazyEngine:
    """The engine of one model: it starts when it is first needed, and stops at the end of the block."""

    def __init__(self, name: ResolvedEngine, candidate: Candidate, options: EngineOptions) -> None:
        self.name = name
        self._candidate, self._options = candidate, options
        self._engine: Engine | None = None

    def start(self, work: str) -> Engine:
        """The running engine; `work` is the reason to print if it starts now. Raises `UserError` if it cannot start."""
        if self._engine is None:
            say(f"model {self._candidate.name}: starting {self.name} for {work}")
            self._engine = open_engine(self.name, self._candidate.source, self._options)
        return self._engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._engine is not None:
            self._engine.close()


@dataclass
class _File:
    """One answers file: which answers it must have, and those that exist so far (None: missing)."""

    eval_set: EvalSet
    seed: int
    path: Path
    fingerprint: str
    partial: AppendOnlyLines
    answers: list[Answer | None]

    @property
    def num_missing(self) -> int:
        return sum(answer is None for answer in self.answers)

    def depth(self, row: int) -> int:
        """How many answers come before a row's question."""
        follow_up = self.eval_set.follow_ups.get(row)
        return 0 if follow_up is None else len(follow_up.places)

    def missing(self, depth: int) -> list[int]:
        """Rows without an answer that are asked after `depth` others."""
        return [row for row, answer in enumerate(self.answers) if answer is None and self.depth(row) == depth]


def request_seed(seed: int, example_id: str) -> int:
    """The seed of one request, below 2**31: a pure function of the evaluation's seed and the example.

    So an answer does not depend on the other rows, on their order, or on where a run was resumed, except for rounding:
    in another batch the engine adds in another order, and may then sample another token if two are about equally
    likely. Finished files are never generated again.
    """
    return derive_seed(seed, example_id, bits=64) % 2**31


def generate_answers(
    config: EvalConfig, engine: LazyEngine, candidate: Candidate, eval_sets: Sequence[EvalSet]
) -> ModelAnswers:
    """The answers of `candidate` to all sets with all seeds.

    Existing answers from the same inputs are reused; the engine starts only for missing ones. Each answer is saved as
    it arrives. Raises `UserError` if the engine cannot start, and if `--generations` has answers from other inputs.
    """
    sampling = Sampling(
        config.temperature, config.top_p, config.max_new_tokens, tuple(candidate.source.stop_token_ids())
    )
    files = _open_files(config, engine.name, candidate, eval_sets, sampling)
    num_total = sum(len(file.answers) for file in files)
    num_missing = sum(file.num_missing for file in files)
    if num_missing == 0:
        say(f"model {candidate.name}: all {num_total} responses exist already")
    else:
        running = engine.start(f"{num_missing} responses")
        with Progress(f"model {candidate.name}", num_total, "responses", done=num_total - num_missing) as progress:
            # a follow-up question is asked after the answers to those before it
            for depth in sorted({file.depth(row) for file in files for row in range(len(file.answers))}):
                missing = [(file, row) for file in files for row in file.missing(depth)]
                requests = (
                    _request(index, file, row, candidate, config.max_prompt_tokens)
                    for index, (file, row) in enumerate(missing)
                )
                for result in results_only(running.generate(requests, sampling)):
                    file, row = missing[result.index]
                    _add(file, row, result, candidate)
                    progress.advance()
    answers: ModelAnswers = {}
    for file in files:
        answers.setdefault(file.eval_set.name, {})[file.seed] = _complete(file)
    return answers


def _open_files(
    config: EvalConfig, engine: str, candidate: Candidate, eval_sets: Sequence[EvalSet], sampling: Sampling
) -> list[_File]:
    files = []
    for eval_set in eval_sets:
        example_ids = [example.example_id for example in eval_set.examples]
        prompts = [prompt.ids for prompt in eval_set.prompts[candidate.name]]
        shared = fingerprint(
            {
                "format_version": _FORMAT_VERSION,
                "engine": engine,
                **candidate.identity,
                "data": eval_set.identity,
                "sampling": asdict(sampling),
                "prompts": list(zip(example_ids, prompts, strict=True)),
            }
        )
        for seed in config.resolved_seeds():
            path = answers_path(config.generations_dir(), candidate.name, eval_set.name, seed)
            file_fingerprint = fingerprint({"shared": shared, "seed": seed})
            finished = read_answers(path, file_fingerprint, example_ids)
            if finished is None and config.generations is not None and path.exists():
                raise UserError(
                    "the directory of answers has a file that was made from other inputs",
                    where=path,
                    advice="Choose another --generations or another name for the model; nothing was overwritten",
                )
            partial = partial_answers(path, file_fingerprint)
            known = partial.read(lambda value: Answer(**value)) if finished is None else finished
            answers = {answer.example_id: answer for answer in known}
            file = _File(eval_set, seed, path, file_fingerprint, partial, [answers.get(key) for key in example_ids])
            if finished is None and file.num_missing == 0:
                _write(file)  # the process was killed after the last answer and before writing the file
            files.append(file)
    return files


def _request(index: int, file: _File, row: int, candidate: Candidate, most: int) -> GenerateRequest:
    eval_set = file.eval_set
    ids = eval_set.prompts[candidate.name][row].ids
    if row in eval_set.follow_ups:
        texts = [None if answer is None else answer.answer for answer in file.answers]
        ids = candidate.encoder.prompt(eval_set.asked(row, texts)).ids
        if len(ids) > most:
            raise UserError(
                "a question with the model's answers before it is longer than a prompt may be",
                found=f"{len(ids)} tokens",
                expected=f"at most {most}",
                where=f"{eval_set.examples[row].example_id} of data {eval_set.name}, model {candidate.name}",
                advice="Raise --max-prompt-tokens, or lower --max-new-tokens",
            )
    return GenerateRequest(index, ids, request_seed(file.seed, eval_set.examples[row].example_id))


def _add(file: _File, row: int, result: EngineResult, candidate: Candidate) -> None:
    assert file.answers[row] is None, "the engine answered a request twice"
    response_ids = [int(token) for token in result.response_ids]
    example_id, text = file.eval_set.examples[row].example_id, candidate.encoder.decode(response_ids)
    answer = Answer(example_id, text, response_ids, result.finish_reason)
    file.answers[row] = answer
    file.partial.append(asdict(answer))
    if file.num_missing == 0:
        _write(file)


def _write(file: _File) -> None:
    write_answers(file.path, _complete(file), file.fingerprint)
    file.partial.delete()


def _complete(file: _File) -> list[Answer]:
    answers = [answer for answer in file.answers if answer is not None]
    assert len(answers) == len(file.answers), "the engine left requests unanswered"
    return answers
