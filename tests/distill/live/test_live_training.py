"""`dpkd train --student-samples live` from end to end, against a real vLLM server with the toy teacher."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support.commands import Command, TwoRanks
from support.samples import stored_rows
from support.vllm_servers import VllmServer

from dpkd.core.files import write_atomic
from dpkd.core.identity import file_sha256
from dpkd.distill.live.teacher import TeacherServers
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.training import train
from dpkd.teacher_cache.engines.engine import FailedRequest
from dpkd.teacher_cache.engines.server.engine import ServerEngine

pytestmark = pytest.mark.engine


@pytest.fixture
def url(toy_server: VllmServer) -> str:
    return toy_server.url


DEFAULTS: dict[str, Any] = {
    "steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "device": "cpu",
    "student_samples": "live",
    "sample_max_new_tokens": 12,
    "responses": "teacher",
    "save_every": 2,
    "keep_checkpoints": 9,
}


def config(out: Path, cache: Path, student: Path, url: str, **options: Any) -> TrainConfig:
    return TrainConfig(out=out, cache=str(cache), student=str(student), teacher_url=(url,), **(DEFAULTS | options))


def lines_of(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def without_times(run: Path) -> list[dict[str, Any]]:
    unsteady = ("_s", "_bytes")
    return [{key: value for key, value in line.items() if not key.endswith(unsteady)} for line in lines_of(run)]


SEQUENCE = {"level": "sequence", "beta": 1.0}


@pytest.mark.parametrize(
    "options",
    [
        SEQUENCE,
        SEQUENCE | {"num_student_samples": 2, "pairing": "all", "staleness": 0},
        SEQUENCE | {"num_student_samples": 2, "pairing": "best-vs-worst", "sample_every": 2},
        {"level": "token"},
        {"objective": "reverse-kl", "staleness": 0},
        {"objective": "minillm", "staleness": 0},
        {"objective": "minillm", "staleness": 1, "sample_every": 2, "learning_rate": 1e-2},
        {"objective": "distillm2"},
        {"objective": "jsd", "mix": 0.5},
        {"objective": "jsd", "mix": 0.1, "staleness": 0},  # steps without a response of the student
    ],
    ids=str,
)
def test_every_kind_of_objective_trains_on_live_samples(
    tmp_path: Path, toy_cache: Path, toy_student: Path, url: str, options: dict[str, Any]
) -> None:
    run = train(config(tmp_path / "run", toy_cache, toy_student, url, validation_examples=4, **options))
    lines = lines_of(run)
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert all(line["kld"] >= 0 for line in lines)
    if "mix" in options:
        assert 0 < len(list(stored_rows(run))) < 6 * 4
    elif options.get("objective") == "minillm":
        # tokens have moved since they were drawn only where the weights have
        moved = any(line["clipped_share"] > 0 for line in lines)
        assert moved == (options["staleness"] == 1)
    elif options.get("objective") == "distillm2":
        assert lines[0]["rejected_length"] <= 12
        assert lines[0]["skew_gap_rejected"] is not None
    elif options.get("level") == "sequence":
        assert lines[0]["rejected_length"] <= 12
        assert lines[0]["reward_margin"] is not None
    else:
        # what is learnt from are the student's own responses
        assert lines[0]["chosen_length"] <= 12
        assert lines[0]["rejected_length"] is None
    rows = list(stored_rows(run))
    assert rows
    assert {row.origin for row in rows} == {"student"}
    assert all(row.distributions is not None and row.sampling_logprobs is not None for row in rows)
    assert json.loads((run / "validation.jsonl").read_text().splitlines()[-1])["kld"] >= 0


def test_a_killed_live_run_ends_as_the_one_that_was_not(
    tmp_path: Path, toy_cache: Path, toy_student: Path, url: str
) -> None:
    """SIGKILL twice, then again with no server's help for what is stored: bitwise the same weights and metrics."""
    whole = train(config(tmp_path / "whole", toy_cache, toy_student, url, **SEQUENCE))
    run = tmp_path / "killed"
    options = config(run, toy_cache, toy_student, url, **SEQUENCE)
    file = tmp_path / "run.toml"
    write_atomic(file, options.to_toml().encode())
    for until in (3, 5, None):
        process = Command("train", "--config", file)
        while until is not None and process.poll() is None and len(lines_of(run)) < until:
            time.sleep(0.01)
        if until is not None:
            process.kill()
        done = process.finish()
        assert done.returncode == (0 if until is None else -signal.SIGKILL), done.stderr
    assert without_times(run) == without_times(whole)
    assert file_sha256(run / "model.safetensors") == file_sha256(whole / "model.safetensors")


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_live_mix_resumes_bit_for_bit_and_some_steps_draw_nothing(
    tmp_path: Path, toy_cache: Path, toy_student: Path, url: str, staleness: int
) -> None:
    """Rows come from the teacher and, one in ten, from the student, so that blocks without any draw exist."""
    options = {"objective": "jsd", "mix": 0.1, "staleness": staleness}
    whole = train(config(tmp_path / "whole", toy_cache, toy_student, url, **options))
    blocks = [*(whole / "samples" / "shards").glob("*.parquet")]
    assert 0 < len(blocks) < 6
    again = Path(shutil.copytree(whole, tmp_path / "again"))
    for path in (again / "run.json", again / "model.safetensors"):
        path.unlink()
    shutil.rmtree(again / "checkpoint-4")  # back to step 2
    train(config(again, toy_cache, toy_student, url, **options))
    assert without_times(again) == without_times(whole)
    assert file_sha256(again / "model.safetensors") == file_sha256(whole / "model.safetensors")


def test_a_mix_goes_on_without_responses_that_cannot_be_scored(
    tmp_path: Path, toy_cache: Path, toy_student: Path, url: str, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One row in ten is the student's: where the teacher can score none of a step, its own rows are left."""
    monkeypatch.setattr(TeacherServers, "_check_identity", lambda *_: None)
    monkeypatch.setattr(ServerEngine, "score", lambda self, requests: (FailedRequest(r.index, "no") for r in requests))
    run = train(config(tmp_path / "run", toy_cache, toy_student, url, objective="jsd", mix=0.1, staleness=0))
    assert [line["step"] for line in lines_of(run)] == list(range(1, 7))
    assert "the teacher cannot score 1 of 1 responses" in capfd.readouterr().err


def test_two_ranks_draw_their_own_rows_and_the_error_of_one_ends_both(
    tmp_path: Path, toy_cache: Path, toy_student: Path, url: str
) -> None:
    """Each rank has half of a step's samples; an error on one ends both instead of a wait without end."""
    run = tmp_path / "run"
    here = {"out": run, "cache": toy_cache, "student": toy_student, "teacher_url": url}
    options = here | DEFAULTS | SEQUENCE | {"batch_size": 2}
    TwoRanks(options).finish()
    assert [line["step"] for line in lines_of(run)] == list(range(1, 7))
    by_rank = [len([*(run / "samples" / "shards").glob(f"*-rank-000{rank}.parquet")]) for rank in range(2)]
    assert by_rank == [6, 6]
    drawn = [(row.example_id, row.sample) for row in stored_rows(run)]
    assert len(drawn) == 6 * 4

    # back to the checkpoint of step 4, without what rank 1 drew for the steps after it
    for path in (run / "run.json", run / "model.safetensors", *(run / "samples").rglob("*-rank-0001*")):
        path.unlink()
    texts = TwoRanks(options).finish(2)
    assert ["the student's samples are missing" in text for text in texts] == [False, True], texts
