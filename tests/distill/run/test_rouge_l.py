"""`--best-metric rouge_l`: what answers are compared with, and how long they may be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dpkd.core.models import ModelSource, locate_model
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.run.best import HeldOutPrompt
from dpkd.distill.training import train
from dpkd.pipelines.bridges import rouge_l_evaluator
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.engines import open as engines
from dpkd.teacher_cache.engines.engine import EngineOptions, GenerateRequest, Sampling
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.reader import TeacherCache

MAX_NEW_TOKENS = 12  # the toy cache's own


def config(out: Path, cache: Path | tuple[str, ...], student: Path, **options: Any) -> TrainConfig:
    defaults = {
        "steps": 1, "batch_size": 4, "learning_rate": 1e-3, "device": "cpu", "tracker": "none",
        "validation_examples": 4, "best_metric": "rouge_l",
    }  # fmt: skip
    caches = cache if isinstance(cache, tuple) else str(cache)
    return TrainConfig(out=out, cache=caches, student=str(student), **(defaults | options))


def prompts_of(options: TrainConfig) -> list[HeldOutPrompt]:
    """What a run hands to the function that measures Rouge-L."""
    seen: list[list[HeldOutPrompt]] = []

    def evaluate(directory: Path, prompts: Sequence[HeldOutPrompt]) -> float:
        seen.append([*prompts])
        return 1.0

    train(options, evaluate)
    assert all(prompts == seen[0] for prompts in seen)
    return seen[0]


def responses_of(cache: Path, origin: str, student: ModelSource) -> dict[tuple[int, ...], list[str]]:
    """Texts of the responses of one origin, by prompt."""
    opened = TeacherCache.open(cache)
    texts: dict[tuple[int, ...], list[str]] = {}
    for _, shard in opened.scan(opened.shards(origin)):
        for row in map(shard.row, range(len(shard))):
            texts.setdefault(tuple(row.prompt_ids.tolist()), []).append(student.decode(row.response_ids.tolist()))
    return texts


@pytest.mark.parametrize(
    "options",
    [
        {"responses": "all"},
        {"responses": "teacher"},
        {"responses": "reference"},
        {"objective": "seqkd"},
        {"level": "sequence", "round": "r0"},
        {"level": "sequence", "round": "r0", "pairing": "best-vs-worst", "responses": "all"},
        {"objective": "reverse-kl", "round": "r0", "mix": 0.5},
    ],
    ids=str,
)
def test_answers_are_compared_with_the_references_of_the_cache(
    tmp_path: Path, toy_cache: Path, toy_student: Path, options: dict[str, Any]
) -> None:
    """Whatever rows the run trains on."""
    references = responses_of(toy_cache, "reference", locate_model(str(toy_student), "student"))
    prompts = prompts_of(config(tmp_path / "run", toy_cache, toy_student, **options))
    assert len({tuple(prompt.prompt_ids) for prompt in prompts}) == 4
    for prompt in prompts:
        assert prompt.references == references[tuple(prompt.prompt_ids)]


@pytest.fixture
def teachers_alone(tmp_path: Path, toy_teacher: Path, toy_data: Path) -> Path:
    """A cache without references, whose responses have at most 20 tokens."""
    options = {"engine": "transformers", "template": "chat", "max_new_tokens": 20, "top_k": 16, "device": "cpu"}
    build_cache(CacheConfig(teacher=str(toy_teacher), data=str(toy_data), out=tmp_path / "alone", **options))
    return tmp_path / "alone"


def test_without_references_they_are_compared_with_the_teachers_responses(
    tmp_path: Path, toy_cache: Path, teachers_alone: Path, toy_student: Path
) -> None:
    student = locate_model(str(toy_student), "student")
    teachers = responses_of(teachers_alone, "teacher", student)
    for prompt in prompts_of(config(tmp_path / "run", teachers_alone, toy_student)):
        assert prompt.references == teachers[tuple(prompt.prompt_ids)]
    # of two caches one has references to the same examples
    references = responses_of(toy_cache, "reference", student)
    both = (f"{toy_cache}=0.5", f"{teachers_alone}=0.5")
    for prompt in prompts_of(config(tmp_path / "both", both, toy_student, responses="teacher")):
        assert prompt.references == references[tuple(prompt.prompt_ids)]


def test_answers_are_as_long_as_those_of_the_cache(
    tmp_path: Path, toy_cache: Path, teachers_alone: Path, toy_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 tokens, a default of --data, made the metric compare long answers with short references."""
    limits: list[int] = []
    lengths: list[int] = []
    open_engine = engines.open_engine

    class Watched:
        def __init__(self, engine: Any) -> None:
            self._engine = engine

        def generate(self, requests: Iterable[GenerateRequest], sampling: Sampling) -> Iterator[Any]:
            limits.append(sampling.max_new_tokens)
            for answer in self._engine.generate(requests, sampling):
                lengths.append(len(answer.response_ids))
                yield answer

    @contextmanager
    def watched(name: str, model: ModelSource, options: EngineOptions) -> Iterator[Watched]:
        with open_engine(name, model, options) as engine:
            yield Watched(engine)

    monkeypatch.setattr(engines, "open_engine", watched)
    run = train(config(tmp_path / "run", toy_cache, toy_student))
    assert set(limits) == {MAX_NEW_TOKENS}
    assert max(lengths) == MAX_NEW_TOKENS
    limits.clear()
    train(config(tmp_path / "both", (f"{toy_cache}=0.5", f"{teachers_alone}=0.5"), toy_student))
    assert set(limits) == {20}  # the longer of two
    limits.clear()
    options = config(tmp_path / "unused", toy_cache, toy_student)
    assert 0 <= rouge_l_evaluator(options, 600)(run, [HeldOutPrompt([5, 6, 7], ["a text"])]) <= 100
    assert limits == [512 - 3]  # the student's own positions
