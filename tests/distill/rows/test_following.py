"""Training while the cache is being written: both processes run, the order is recorded, and a kill loses nothing."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import Command

from dpkd.core.errors import UserError
from dpkd.distill.batches.order import FollowOrder
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.following import FollowedRows
from dpkd.distill.run.interrupts import Interrupts
from dpkd.distill.run.loader import StepLoader
from dpkd.distill.run.ranks import open_accelerator
from dpkd.distill.run.setup import open_run
from dpkd.distill.training import train
from dpkd.teacher_cache.store.folders import open_folder
from dpkd.teacher_cache.store.growing import GrowingCache
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.reader import CACHE_KIND, TeacherCache


def start_cache(out: Path, teacher: Path, data: Path) -> Command:
    return Command(
        "cache-teacher", "--teacher", teacher, "--data", data, "--out", out, "--engine", "transformers",
        "--template", "chat", "--max-new-tokens", 200, "--top-k", 16, "--set", "rows_per_shard=8",
    )  # fmt: skip


def start_training(out: Path, cache: Path, student: Path, steps: int) -> Command:
    return Command(
        "train", "--cache", cache, "--student", student, "--out", out, "--follow", "--steps", steps,
        "--batch-size", 8, "--device", "cpu", "--set", "save_every=5",
    )  # fmt: skip


def config(out: Path, cache: Path, student: Path, **options: Any) -> TrainConfig:
    return TrainConfig(out=out, cache=cache, student=str(student), follow=True, batch_size=8, device="cpu", **options)


def metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [
        {key: value for key, value in json.loads(line).items() if not key.endswith(("_s", "_bytes"))}
        for line in lines
        if line.endswith("}")
    ]


def wait_until(ready: Any, *processes: Command) -> None:
    deadline_s = time.monotonic() + 180
    while not ready():
        assert time.monotonic() < deadline_s
        for process in processes:
            assert process.poll() in (None, 0), process.stderr
        time.sleep(0.02)


@pytest.mark.engine
def test_both_processes_run_and_a_killed_trainer_resumes(
    tmp_path: Path, toy_teacher: Path, toy_student: Path, repeat_rows: Callable[[Path, int], Path]
) -> None:
    cache, run, steps = tmp_path / "cache", tmp_path / "run", 40
    data = repeat_rows(tmp_path / "data.jsonl", 16)  # 320 rows: one pass is 40 steps of 8
    trainer = start_training(run, cache, toy_student, steps)
    wait_until(lambda: True, trainer)
    writer = start_cache(cache, toy_teacher, data)
    wait_until(lambda: len(list((cache / "ledger").glob("[!.]*.json"))) >= 9, trainer, writer)
    writer.send_signal(signal.SIGSTOP)
    wait_until(lambda: len(metrics(run)) >= 7, trainer, writer)
    # it has learnt from shards of a cache that has no manifest yet
    assert not (cache / "manifest.json").exists()
    trainer.kill()
    writer.send_signal(signal.SIGCONT)
    order_at_kill = (run / "followed.jsonl").read_text().splitlines()

    again = start_training(run, cache, toy_student, steps).finish()
    assert again.returncode == 0, again.stderr
    assert "resuming from step 5 of 40" in again.stderr
    assert writer.finish().returncode == 0
    assert (cache / "manifest.json").exists()

    _, *lines = (run / "followed.jsonl").read_text().splitlines()
    order = [json.loads(line)["path"] for line in lines]
    assert (run / "followed.jsonl").read_text().splitlines()[: len(order_at_kill)] == order_at_kill
    assert sorted(order) == [shard.path for shard in TeacherCache.open(cache).shards()]
    # the same steps on the finished cache, without a kill or a wait: this engine commits its shards in order
    assert order == sorted(order)
    replay = train(config(tmp_path / "replay", cache, toy_student, steps=steps))
    assert "| Teacher | `" in (replay / "README.md").read_text()
    assert metrics(replay) == metrics(run)
    assert (replay / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


@pytest.mark.engine
def test_an_interrupt_while_it_waits_ends_the_trainer(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    cache = unfinished(tmp_path / "cache", toy_cache, 3)
    trainer = start_training(tmp_path / "run", cache, toy_student, 4)
    wait_until(lambda: len(metrics(tmp_path / "run")) >= 2, trainer)
    time.sleep(1)
    trainer.send_signal(signal.SIGINT)
    done = trainer.finish()
    assert done.returncode == 130, done.stderr
    assert "read 18 of 40 rows of the cache so far; waiting for more" in done.stderr
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


def unfinished(out: Path, toy_cache: Path, num_shards: int) -> Path:
    """The toy cache as a job leaves it that was killed after its first shards."""
    whole = TeacherCache.open(toy_cache)
    job = Job(open_folder(out), CACHE_KIND, whole.identities)
    with job.opened("", {"teacher": 20, "reference": 20}):
        for record in whole.shards()[:num_shards]:
            job.commit(whole.folder.read(record.path), record)
    return out


def grow(out: Path, toy_cache: Path) -> None:
    """Finish what `unfinished` began."""
    whole = TeacherCache.open(toy_cache)
    job = Job(open_folder(out), CACHE_KIND, whole.identities)
    with job.opened("", {"teacher": 20, "reference": 20}):
        for record in whole.shards():
            if record.path not in job.committed:
                job.commit(whole.folder.read(record.path), record)
        job.finish([])


def test_a_cache_that_stops_growing_is_an_error_that_keeps_the_checkpoint(
    tmp_path: Path, toy_cache: Path, toy_student: Path
) -> None:
    cache = unfinished(tmp_path / "cache", toy_cache, 3)
    settings = config(tmp_path / "run", cache, toy_student, epochs=1, follow_timeout_s=1)
    with pytest.raises(UserError, match="no job has written to the cache for 1 s: found 18 rows, expected 40"):
        train(settings)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    grow(cache, toy_cache)
    train(settings)
    # one epoch is known from the plan: 40 rows in steps of 8
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_the_first_epoch_is_in_order_of_commitment_and_later_ones_are_permutations(
    tmp_path: Path, toy_cache: Path, toy_student: Path
) -> None:
    cache = GrowingCache.open(unfinished(tmp_path / "cache", toy_cache, 5))
    assert cache is not None
    rows = FollowedRows(cache, config(tmp_path / "run", tmp_path / "cache", toy_student, steps=1), None)
    (tmp_path / "run").mkdir()
    rows.start(tmp_path / "run", leader=True)
    order = FollowOrder(rows, seed=3, global_batch_size=10)
    first = order.rows_of(0) + order.rows_of(1)
    assert [group for group, _ in first] == [0] * 6 + [1] * 6 + [2] * 6 + [3] * 2
    grow(tmp_path / "cache", toy_cache)
    first += order.rows_of(2) + order.rows_of(3)
    everything = {(group, row) for group, size in enumerate(rows.group_sizes) for row in range(size)}
    assert len(first) == len(set(first)) == 40
    assert set(first) == everything
    second = [place for step in range(4, 8) for place in order.rows_of(step)]
    assert set(second) == everything
    assert second != first
    assert [order.epoch_of(step) for step in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    # another rank reads the same order from the run
    follower = FollowedRows(cache, config(tmp_path / "run", tmp_path / "cache", toy_student, steps=1), None)
    follower.start(tmp_path / "run", leader=False)
    assert FollowOrder(follower, seed=3, global_batch_size=10).rows_of(2) == first[20:30]


def test_new_shards_are_logged_when_the_loop_asks_for_them(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    settings = config(tmp_path / "run", unfinished(tmp_path / "cache", toy_cache, 3), toy_student, steps=1)
    settings.out.mkdir()
    run, log = open_run(settings), settings.out / "followed.jsonl"

    def logged() -> list[str]:
        """Paths of shards in the run's log."""
        return [json.loads(line)["path"] for line in log.read_text().splitlines()[1:]] if log.exists() else []

    with Interrupts() as interrupts, StepLoader(
        run, open_accelerator(settings), torch.nn.Linear(1, 1), run.steps, interrupts
    ) as loader:  # fmt: skip
        for name in dir(loader):
            getattr(loader, name)
        assert not logged()  # to look at the loader writes nothing
        paths = [shard.path for shard in TeacherCache.open(toy_cache).shards()]
        assert loader.sync_followed_shards()
        assert logged() == sorted(paths[:3])
        grow(tmp_path / "cache", toy_cache)
        assert not loader.sync_followed_shards()
        assert sorted(logged()) == sorted(paths)


def test_a_cache_that_no_job_writes_is_an_error(tmp_path: Path, toy_student: Path) -> None:
    with pytest.raises(UserError, match=r"no job has started the cache in 0 s \(in .*nowhere\)"):
        train(config(tmp_path / "run", tmp_path / "nowhere", toy_student, steps=1, follow_timeout_s=0.1))
    assert not (tmp_path / "run").exists()
