"""Live samples of a cache with several responses to a prompt: which are drawn, which are paired, what is refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.local_teacher import LocalTeacher
from support.samples import stored_rows

from dpkd.core.errors import UserError
from dpkd.core.identity import file_sha256
from dpkd.distill.live import rows as live_module
from dpkd.distill.live.rows import LiveRows
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.row import RowIndex, RowSource, TrainingRow, indices_of
from dpkd.distill.rows.sources import open_cache_rows
from dpkd.distill.run.setup import open_run
from dpkd.distill.training import train
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.rows import CachedRow

BEST_VS_WORST: dict[str, Any] = {"level": "sequence", "pairing": "best-vs-worst", "num_student_samples": 3}


@pytest.fixture(scope="session")
def cache_of_two(tmp_path_factory: pytest.TempPathFactory, toy_teacher: Path, toy_data: Path) -> Path:
    """Two teacher responses and a reference to each of 20 prompts; the two may be in two shards."""
    out = tmp_path_factory.mktemp("caches") / "two"
    build_cache(
        CacheConfig(
            teacher=str(toy_teacher), data=str(toy_data), out=out, engine="transformers", template="chat",
            responses="both", num_samples=2, max_new_tokens=12, top_k=16, rows_per_shard=7, device="cpu",
        )
    )  # fmt: skip
    return out


def config(out: Path, cache: Path, student: Path, **options: Any) -> TrainConfig:
    defaults = {
        "steps": 3, "batch_size": 4, "learning_rate": 1e-3, "device": "cpu", "student_samples": "live", "staleness": 0,
        "teacher_url": ("http://127.0.0.1:1",), "tracker": "none", "validation_examples": 4,
    }  # fmt: skip
    return TrainConfig(out=out, cache=str(cache), student=str(student), **(defaults | options))


def all_rows(rows: RowSource) -> list[CachedRow]:
    return [rows.row(*index).chosen for index in indices_of(rows)]


def mean_logprob(row: CachedRow) -> float:
    return sum(row.response_logprobs.tolist()) / len(row.response_logprobs)


def key(row: CachedRow) -> tuple[str, str, int]:
    return row.example_id, row.origin, row.sample


@pytest.mark.parametrize("responses", ["teacher", "all"])
def test_best_vs_worst_has_one_row_an_example(
    tmp_path: Path, cache_of_two: Path, toy_student: Path, responses: str
) -> None:
    cache = TeacherCache.open(cache_of_two)
    origin = None if responses == "all" else responses
    everything = [shard.row(index) for _, shard in cache.scan(cache.shards(origin)) for index in range(len(shard))]
    best: dict[str, CachedRow] = {}
    for row in everything:
        if row.example_id not in best or mean_logprob(row) > mean_logprob(best[row.example_id]):
            best[row.example_id] = row
    assert len({row.sample for row in best.values()}) == 2
    run = open_run(config(tmp_path / "run", cache_of_two, toy_student, responses=responses, **BEST_VS_WORST))
    training = all_rows(run.rows)
    assert len(training) == run.order.num_rows == 16
    assert {key(row) for row in training} == {key(best[row.example_id]) for row in training}
    # validated on all responses of the other examples, as with any other pairing
    assert run.validation.rows is not None
    validation = all_rows(run.validation.rows)
    held_out = set(best) - {row.example_id for row in training}
    assert Counter(map(key, validation)) == Counter(key(row) for row in everything if row.example_id in held_out)


def test_the_teachers_best_is_paired_with_the_students_worst(
    tmp_path: Path, cache_of_two: Path, toy_student: Path, toy_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalTeacher, "directory", toy_teacher, raising=False)
    monkeypatch.setattr(live_module, "TeacherServers", LocalTeacher)
    seen: dict[int, list[TrainingRow]] = {}
    rows_of = LiveRows.rows

    def rows(self: LiveRows, step: int, row_indices: Sequence[RowIndex]) -> list[TrainingRow]:
        seen[step] = rows_of(self, step, row_indices)
        return seen[step]

    monkeypatch.setattr(LiveRows, "rows", rows)
    run = train(config(tmp_path / "run", cache_of_two, toy_student, **BEST_VS_WORST))
    stored = list(stored_rows(run))
    assert len(stored) == 3 * 4 * 3
    assert [len(rows) for rows in seen.values()] == [4, 4, 4]
    for step, rows_of_step in seen.items():
        drawn = stored[step * 12 : (step + 1) * 12]
        assert len({row.chosen.example_id for row in rows_of_step}) == 4
        for row in rows_of_step:
            three = [other for other in drawn if other.example_id == row.chosen.example_id]
            assert [other.sample for other in three] == [0, 1, 2]
            assert row.rejected is not None
            assert key(row.rejected) == key(min(three, key=mean_logprob))
    # a run that stops after a step and resumes draws and learns the same
    assert len({tuple(row.response_ids.tolist()) for row in stored}) > 30
    half = config(tmp_path / "half", cache_of_two, toy_student, save_every=1, **BEST_VS_WORST)
    with monkeypatch.context() as stop:
        stop.setattr(LiveRows, "before_step", _stop_at(2))
        with pytest.raises(RuntimeError, match="stopped"):
            train(half)
    again = train(half)
    assert [key(row) for row in stored_rows(again)] == [key(row) for row in stored]
    assert file_sha256(again / "model.safetensors") == file_sha256(run / "model.safetensors")


def _stop_at(last: int) -> Any:
    before_step = LiveRows.before_step

    def stopping(self: LiveRows, step: int) -> None:
        if step == last:
            raise RuntimeError("stopped")
        before_step(self, step)

    return stopping


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "reverse-kl"},
        {"level": "token"},
        {"objective": "minillm"},
        {"objective": "jsd", "mix": 0.5},
        {"level": "sequence"},
        {"objective": "distillm2"},
    ],
    ids=str,
)
def test_more_samples_than_the_cache_has_of_a_prompt_are_refused(
    tmp_path: Path, cache_of_two: Path, toy_cache: Path, toy_student: Path, options: dict[str, Any]
) -> None:
    """They were drawn and trained one to a row of the cache, whatever the option said."""
    paired = options.get("level") == "sequence" or options.get("objective") == "distillm2"
    what = "with --pairing index" if paired else "without pairs of responses"
    advice = "give --pairing all or best-vs-worst, " if paired else ""
    for cache, found, most in ((cache_of_two, 3, 2), (toy_cache, 2, 1)):
        chosen = config(tmp_path / "run", cache, toy_student, num_student_samples=found, **options)
        message = (
            f"{what}, training draws no more live responses to a prompt than the cache has samples of it: "
            f"found --num-student-samples {found}, expected at most {most} "
        )
        with pytest.raises(UserError, match=re.escape(message)) as refusal:
            open_run(chosen)
        whole_advice = f"Lower --num-student-samples, {advice}or build a cache with a larger --num-samples"
        assert whole_advice in str(refusal.value)
    as_many = config(tmp_path / "run", cache_of_two, toy_student, num_student_samples=2, **options)
    assert open_cache_rows(TeacherCache.open(cache_of_two), None, as_many).training.group_sizes
