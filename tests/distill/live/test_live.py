"""Live samples with a real vLLM server: which weights draw them, what is stored, and what happens after failures."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import Command, free_port
from support.samples import stored_rows
from support.vllm_servers import VllmServer
from transformers import PreTrainedModel

from dpkd.core.errors import UserError
from dpkd.core.identity import derive_seed
from dpkd.core.models import locate_model
from dpkd.distill.batches.order import BatchOrder
from dpkd.distill.live import rows as live_module
from dpkd.distill.live.rows import LiveRows
from dpkd.distill.live.teacher import TeacherServers
from dpkd.distill.live.transformers_sampler import TransformersSampler
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.row import TrainingRow
from dpkd.distill.rows.sources import open_cache_rows
from dpkd.distill.training import train
from dpkd.teacher_cache.engines.engine import (
    EngineOptions,
    EngineResult,
    FailedRequest,
    GenerateRequest,
    Sampling,
    ScoreRequest,
    results_only,
)
from dpkd.teacher_cache.engines.open import open_engine
from dpkd.teacher_cache.engines.server.engine import ServerEngine
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.rows import CachedRow

pytestmark = pytest.mark.engine

CPU = torch.device("cpu")
BATCH = 4
MAX_NEW_TOKENS = 12  # the toy cache's own
STEPS = 7


class Gate:
    """A way to the server that can be shut: connections end, and new ones are refused."""

    def __init__(self, port: int) -> None:
        self._to, self.port = port, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._open: list[socket.socket] = []
        self.open()

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                self._open += [client, server]
                for one, two in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=(one, two), daemon=True).start()

    def _pass(self, one: socket.socket, two: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                two.sendall(data)
            two.shutdown(socket.SHUT_WR)

    def shut(self) -> None:
        for held in [self._listener, *self._open]:
            with contextlib.suppress(OSError):
                held.shutdown(socket.SHUT_RDWR)  # a thread may be waiting in it
            held.close()
        self._open = []


@pytest.fixture
def gate(toy_server: VllmServer) -> Iterator[Gate]:
    gate = Gate(toy_server.port)
    yield gate
    gate.shut()


@dataclass
class Loop:
    """A trainer without an objective: it asks for rows, then moves the weights, always the same way."""

    config: TrainConfig
    model: PreTrainedModel
    patience_s: float = 60.0
    steps: int = STEPS
    rank: int = 0
    ranks: int = 1
    weights: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)  # before each step

    def __post_init__(self) -> None:
        assert self.config.cache is not None
        self.cache = TeacherCache.open(self.config.cache)
        self.rows = open_cache_rows(self.cache, None, self.config).training
        self.order = BatchOrder(self.rows.group_sizes, self.config.seed, BATCH)
        self.student = locate_model(self.config.student, "student")

    def places(self, step: int) -> list[tuple[int, int]]:
        return self.order.rows_of(step)[self.rank :: self.ranks]

    def open(self) -> LiveRows:
        return LiveRows(
            self.config, self.cache, self.rows, self.student, self.model, CPU, self.steps, self.places,
            rank=self.rank, patience_s=self.patience_s,
        )  # fmt: skip

    def cached(self, step: int) -> list[CachedRow]:
        return [self.rows.row(*place).chosen for place in self.places(step)]

    def take(self, live: LiveRows, step: int) -> list[TrainingRow]:
        """The rows of `step`; the weights have moved after it."""
        self.weights[step] = copy.deepcopy(self.model.state_dict())
        live.before_step(step)
        rows = live.rows(step, self.places(step))
        self.move(step)
        return rows

    @torch.no_grad()
    def move(self, step: int) -> None:
        random = torch.Generator().manual_seed(step)
        for parameter in self.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=random))

    def run(self, first: int = 0, last: int | None = None) -> list[list[TrainingRow]]:
        live = self.open()
        try:
            return [self.take(live, step) for step in range(first, last or self.steps)]
        finally:
            live.close()


@pytest.fixture
def loop(tmp_path: Path, toy_server: VllmServer, toy_cache: Path, toy_student: Path) -> Callable[..., Loop]:
    """A loop with the given training options; `run` names its directory."""

    def make(run: str = "run", url: str = toy_server.url, **options: Any) -> Loop:
        fields = {name: options.pop(name) for name in ("patience_s", "steps", "rank", "ranks") if name in options}
        config = TrainConfig(
            validation_examples=0,
            cache=toy_cache, student=str(toy_student), out=tmp_path / run, student_samples="live", teacher_url=(url,),
            **({"level": "sequence", "responses": "all"} | options),
        )  # fmt: skip
        return Loop(config, locate_model(str(toy_student), "student").load("float32"), **fields)

    return make


def drawn_by(loop: Loop, weights_of: int, step: int, rows: list[CachedRow], sample: int = 0) -> list[list[int]]:
    """What the weights before step `weights_of` draw for `rows` in `step`, by hand and one by one."""
    model = copy.deepcopy(loop.model)
    model.load_state_dict(loop.weights[weights_of])
    sampling = Sampling(1.0, 1.0, MAX_NEW_TOKENS, (0,))
    sampler = TransformersSampler(model, sampling, num_tokens=600, device=CPU, copies=False, batch_size=1)
    found = []
    for row in rows:
        seed = derive_seed(loop.config.seed, row.example_id, sample, step)
        found += sampler.draw([GenerateRequest(0, row.prompt_ids.tolist(), seed)], threading.Event())
    return [drawn.response_ids.tolist() for drawn in found]


def rejected(rows: list[TrainingRow]) -> list[CachedRow]:
    return [row.rejected for row in rows if row.rejected is not None]


def ids_of(rows: list[CachedRow]) -> list[list[int]]:
    return [row.response_ids.tolist() for row in rows]


def once(steps: list[list[CachedRow]]) -> list[CachedRow]:
    """All rows in order; a step's rows of one example (the teacher's and the data's) share the student's response."""
    return [row for rows in steps for row in {(row.example_id, row.sample): row for row in rows}.values()]


def assert_bitwise(ours: list[CachedRow], theirs: list[CachedRow]) -> None:
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        assert (one.example_id, one.sample, one.origin, one.finish_reason) == (
            two.example_id, two.sample, two.origin, two.finish_reason,
        )  # fmt: skip
        for name in ("prompt_ids", "response_ids", "response_logprobs"):
            assert getattr(one, name).tobytes() == getattr(two, name).tobytes(), name
        assert one.distributions is not None
        assert two.distributions is not None
        for name in ("counts_T", "ids_E", "logprobs_E", "log_tail_T"):
            assert getattr(one.distributions, name).tobytes() == getattr(two.distributions, name).tobytes(), name


@pytest.mark.parametrize(
    ("staleness", "every", "weights_of"),
    [
        (0, 1, [0, 1, 2, 3, 4, 5, 6]),
        (0, 3, [0, 0, 0, 3, 3, 3, 6]),
        (1, 1, [0, 0, 1, 2, 3, 4, 5]),
        (1, 3, [0, 0, 0, 0, 0, 0, 3]),
    ],
)
def test_samples_are_drawn_with_the_weights_that_they_should(
    loop: Callable[..., Loop], staleness: int, every: int, weights_of: list[int]
) -> None:
    trainer = loop(staleness=staleness, sample_every=every)
    for step, rows in enumerate(trainer.run()):
        cached = trainer.cached(step)
        assert [row.chosen.example_id for row in rows] == [row.example_id for row in cached]
        assert [row.chosen.response_ids.tolist() for row in rows] == ids_of(cached)
        students = rejected(rows)
        assert {row.origin for row in students} == {"student"}
        assert [row.prompt_ids.tolist() for row in students] == [row.prompt_ids.tolist() for row in cached]
        assert ids_of(students) == drawn_by(trainer, weights_of[step], step, cached)
        for row in students:
            ended = row.response_ids[-1] == 0
            assert row.finish_reason == ("stop" if ended else "length")
            assert ended or len(row.response_ids) == MAX_NEW_TOKENS


def test_scores_are_the_teachers(loop: Callable[..., Loop], toy_teacher: Path) -> None:
    trainer = loop(level="token", steps=2)
    rows = [row for step in trainer.run() for row in step]
    assert all(row.rejected is None for row in rows)
    students = [row.chosen for row in rows]
    options = EngineOptions(max_length=300, top_k=16, dtype="float32")
    requests = [ScoreRequest(i, row.prompt_ids.tolist(), row.response_ids.tolist()) for i, row in enumerate(students)]
    with open_engine("transformers", locate_model(str(toy_teacher), "teacher"), options) as engine:
        for result in results_only(engine.score(requests)):
            ours = students[result.index]
            assert np.abs(ours.response_logprobs - result.logprobs_T).max() < 1e-3
            assert ours.distributions is not None
            assert result.distributions is not None
            assert ours.distributions.counts_T.tolist() == [16] * len(ours.response_ids)
            # half a step of the cache's grid, and the two engines' own difference
            assert np.abs(ours.distributions.logprobs_E - result.distributions.logprobs_E).max() < 1 / 256 + 1e-3
            assert np.abs(ours.distributions.log_tail_T - result.distributions.log_tail_T).max() < 1e-2


def test_pairs_of_several_samples(loop: Callable[..., Loop]) -> None:
    options = {"num_student_samples": 3, "steps": 1, "staleness": 0}
    everyone = loop("all", pairing="all", **options)
    rows = everyone.run()[0]
    cached = everyone.cached(0)
    assert len(rows) == 3 * len(cached)
    students = rejected(rows)
    assert [row.example_id for row in students] == [row.example_id for row in cached for _ in range(3)]
    assert [row.sample for row in students] == [0, 1, 2] * len(cached)
    for sample in range(3):
        assert ids_of(students[sample::3]) == drawn_by(everyone, 0, 0, cached, sample)

    worst = loop("worst", pairing="best-vs-worst", **options)
    rows = worst.run()[0]
    drawn = list(stored_rows(worst.config.out))
    assert len(drawn) == 3 * len(rows) == 3 * BATCH
    for row in rows:  # one of each example, of its teacher's and its reference response
        three = [other for other in drawn if other.example_id == row.chosen.example_id]
        expected = min(three, key=lambda one: one.response_logprobs.sum() / len(one.response_logprobs))
        assert ids_of(rejected([row])) == ids_of([expected])
    for sample in range(3):
        assert ids_of(drawn[sample::3]) == drawn_by(worst, 0, 0, drawn[::3], sample)

    with pytest.raises(UserError, match=r"--pairing index.*: found --num-student-samples 3, expected at most 1"):
        loop("index", pairing="index", **options)


def test_what_was_trained_on_is_stored_and_read_back_bitwise(loop: Callable[..., Loop]) -> None:
    trainer = loop(sample_every=2)
    rows = trainer.run()
    seen = [rejected(step) for step in rows]
    assert_bitwise(list(stored_rows(trainer.config.out)), once(seen))
    assert not list((trainer.config.out / "samples" / "drawn").glob("*"))
    # the same run again reads all of it: the weights do not matter any more
    again = loop(sample_every=2)
    with torch.no_grad():
        again.model.lm_head.weight.fill_(float("nan"))
    for ours, theirs in zip(again.run(), seen, strict=True):
        assert_bitwise(rejected(ours), theirs)


@pytest.mark.parametrize(("staleness", "every", "stop"), [(0, 1, 3), (0, 3, 4), (1, 1, 3), (1, 3, 3), (1, 3, 2)])
def test_a_run_resumes_from_a_checkpoint(loop: Callable[..., Loop], staleness: int, every: int, stop: int) -> None:
    options = {"staleness": staleness, "sample_every": every}
    whole = [rejected(rows) for rows in loop("whole", **options).run()]
    first = loop("cut", **options)
    live = first.open()
    before = [rejected(first.take(live, step)) for step in range(stop)]
    live.settle()
    held = list(stored_rows(first.config.out))
    live.close()
    second = loop("cut", **options)
    second.model.load_state_dict(first.model.state_dict())  # the checkpoint
    after = [rejected(rows) for rows in second.run(stop)]
    for ours, theirs in zip(before + after, whole, strict=True):
        assert ids_of(ours) == ids_of(theirs)
        for one, two in zip(ours, theirs, strict=True):
            assert np.abs(one.response_logprobs - two.response_logprobs).max() < 1e-4
    assert_bitwise(once(before + after)[: len(held)], held)


def test_samples_of_lost_weights_are_not_drawn_again(loop: Callable[..., Loop]) -> None:
    earlier = loop(sample_every=3)
    live = earlier.open()
    for step in range(3):
        earlier.take(live, step)
    live.settle()
    live.close()
    later = loop(sample_every=3)
    shard = later.config.out / "samples" / "shards" / "step-00000003-rank-0000.parquet"
    assert shard.is_file()
    shard.unlink()
    live = later.open()
    try:
        with pytest.raises(UserError, match=r"weights .* are gone: found no samples of steps 3 to 5 .*another --out"):
            live.before_step(3)
    finally:
        live.close()


def test_another_number_of_processes_is_refused(loop: Callable[..., Loop]) -> None:
    loop(ranks=2, steps=1).run()
    with pytest.raises(UserError, match=r"samples belong to other rows .*found 2 rows.*expected 3 rows.*processes"):
        loop(steps=1).run()


def test_two_processes_share_the_rows(loop: Callable[..., Loop]) -> None:
    one = loop("one", steps=2, staleness=0).run()
    halves = [loop("two", steps=2, staleness=0, ranks=2, rank=rank).run() for rank in range(2)]
    for step in range(2):
        assert ids_of(rejected(one[step]))[0::2] == ids_of(rejected(halves[0][step]))
        assert ids_of(rejected(one[step]))[1::2] == ids_of(rejected(halves[1][step]))


def test_a_server_that_dies_and_comes_back_costs_no_sample(loop: Callable[..., Loop], toy_server: VllmServer) -> None:
    expected = [rejected(rows) for rows in loop("expected").run()]
    trainer = loop("broken", patience_s=200)
    live = trainer.open()
    try:
        found = [rejected(trainer.take(live, step)) for step in range(2)]
        toy_server.kill()
        restart = threading.Timer(2.0, toy_server.start)
        restart.start()
        found += [rejected(trainer.take(live, step)) for step in range(2, STEPS)]
        restart.join()
    finally:
        live.close()
    assert [ids_of(rows) for rows in found] == [ids_of(rows) for rows in expected]


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_server_that_stays_away_leaves_a_run_that_can_resume(
    loop: Callable[..., Loop], gate: Gate, staleness: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "SETTLE_S", 1.0)
    expected = [rejected(rows) for rows in loop("expected", staleness=staleness).run()]
    first = loop("broken", gate.url, staleness=staleness, patience_s=2)
    live = first.open()
    found: list[list[CachedRow]] = []

    def go_on(last: int) -> None:
        while len(found) < last:
            found.append(rejected(first.take(live, len(found))))

    try:
        go_on(2)
        gate.shut()
        with pytest.raises(UserError, match=r"no server has answered for 2 s"):
            go_on(STEPS)
        stopped_at = len(found)
        assert stopped_at < STEPS
        started_s = time.monotonic()
        live.settle()
        assert time.monotonic() - started_s < 25
    finally:
        live.close()
    if staleness:
        # drawn with weights that the checkpoint does not hold, so kept without scores
        drafts = sorted((first.config.out / "samples" / "drawn").iterdir())
        assert drafts[0].name == f"step-{stopped_at:08d}-rank-0000.jsonl"
        _, *lines = drafts[0].read_text().splitlines()
        assert {json.loads(line)["finish_reason"] for line in lines} <= {"stop", "length"}
    gate.open()
    second = loop("broken", gate.url, staleness=staleness)
    second.model.load_state_dict(first.model.state_dict())
    found += [rejected(rows) for rows in second.run(stopped_at)]
    assert [ids_of(rows) for rows in found] == [ids_of(rows) for rows in expected]


def test_a_wait_ends_when_the_run_is_given_up(loop: Callable[..., Loop], gate: Gate) -> None:
    trainer = loop(url=gate.url)
    live = trainer.open()
    gate.shut()
    live.before_step(0)
    threading.Timer(1.0, live.release).start()
    started_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        live.rows(0, trainer.places(0))
    live.close()
    assert time.monotonic() - started_s < 25


def test_training_keeps_its_random_numbers(loop: Callable[..., Loop]) -> None:
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    loop(steps=2).run()
    assert torch.equal(torch.rand(4), expected)


def test_a_row_that_cannot_be_scored_makes_no_pair(
    loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = loop(steps=1)
    refused = trainer.cached(0)[1]
    whole = ServerEngine.score

    def score(self: ServerEngine, requests: Iterable[ScoreRequest]) -> Iterator[EngineResult | FailedRequest]:
        for answer in whole(self, requests):
            assert isinstance(answer, EngineResult)
            impossible = np.full_like(answer.logprobs_T, -np.inf)
            yield answer if answer.index != 1 else replace(answer, logprobs_T=impossible)

    live = trainer.open()
    monkeypatch.setattr(ServerEngine, "score", score)
    rows = trainer.take(live, 0)
    live.close()
    assert len(rows) == len([row for row in trainer.cached(0) if row.example_id != refused.example_id])
    assert refused.example_id not in [row.chosen.example_id for row in rows]
    assert "the teacher cannot score 1 of 3 responses" in capsys.readouterr().err
    monkeypatch.undo()
    assert_bitwise(rejected(loop(steps=1).run()[0]), rejected(rows))

    monkeypatch.setattr(TeacherServers, "_check_identity", lambda *_: None)
    monkeypatch.setattr(ServerEngine, "score", lambda self, requests: (FailedRequest(r.index, "no") for r in requests))
    with pytest.raises(UserError, match=r"could score none of the student's responses of step 1"):
        loop("none", steps=1).run()


def test_a_server_with_another_model_is_refused(
    tmp_path: Path, toy_cache: Path, toy_student: Path, toy_tokenizer: Path
) -> None:
    """The tokenizer is the same and the vocabulary too: only what it says of cached responses gives it away."""
    with VllmServer(toy_student) as other:
        cache, student = TeacherCache.open(toy_cache), locate_model(str(toy_student), "student")
        with pytest.raises(UserError) as refusal:
            TeacherServers(cache, [other.url], student, 64, 0.05)
        text = str(refusal.value)
        assert "does not run the cache's teacher, toy-teacher" in text
        assert f"{other.url} with {toy_student}" in text
        assert "expected at most 0.05 (teacher_tolerance)" in text
        assert "a mean difference of" in text
        TeacherServers(cache, [other.url], student, 64, 100.0).close()
        with pytest.raises(UserError, match=rf"too short.*found 512 tokens.*{other.url}"):
            TeacherServers(cache, [other.url], student, 600, 0.05)


def test_no_server_at_all_is_refused(toy_cache: Path, toy_student: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=rf"no server has answered for 1 s.*{url}"):
        TeacherServers(TeacherCache.open(toy_cache), [url], locate_model(str(toy_student), "student"), 64, 0.05, 1.0)


def test_responses_that_do_not_fit_the_student_are_refused(loop: Callable[..., Loop]) -> None:
    with pytest.raises(UserError, match=r"longer than the student's positions.*at most 512.*sample_max_new_tokens"):
        loop(sample_max_new_tokens=512).open()


def test_a_vllm_sampler_draws_with_the_newest_weights(loop: Callable[..., Loop]) -> None:
    trainer = loop("one", sampler="vllm", staleness=0, steps=3)
    found = [ids_of(rejected(rows)) for rows in trainer.run()]
    # again with constant weights: the first step is the same, the later ones are not
    still = loop("two", sampler="vllm", staleness=0, steps=3)
    live = still.open()
    try:
        for step in range(3):
            live.before_step(step)
            same = ids_of(rejected(live.rows(step, still.places(step)))) == found[step]
            assert same == (step == 0)
    finally:
        live.close()


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_killed_run_learns_from_the_same_samples(
    tmp_path: Path, toy_cache: Path, toy_student: Path, toy_server: VllmServer, staleness: int
) -> None:
    options = tmp_path / "train.toml"
    options.write_text(f"staleness = {staleness}\nsave_every = 2\n")

    def start(out: Path) -> Command:
        return Command(
            "train", "--cache", toy_cache, "--student", toy_student, "--out", out, "--level", "sequence",
            "--student-samples", "live", "--teacher-url", toy_server.url, "--steps", 8, "--batch-size", 4,
            "--device", "cpu", "--config", options, "--learning-rate", 1e-3,
        )  # fmt: skip

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(whole).finish().returncode == 0
    process = start(cut)
    deadline_s = time.monotonic() + 120
    while not (cut / "checkpoint-4").is_dir():
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    process.kill()
    assert start(cut).finish().returncode == 0
    ours, theirs = list(stored_rows(cut)), list(stored_rows(whole))
    assert [(row.example_id, row.response_ids.tolist()) for row in ours] == [
        (row.example_id, row.response_ids.tolist()) for row in theirs
    ]
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (cut, whole)]
    assert [line["step"] for line in lines[0]] == list(range(1, 9))
    assert [line["loss"] for line in lines[0]] == pytest.approx([line["loss"] for line in lines[1]], abs=1e-4)


@pytest.mark.parametrize("ending", ["the server is lost", "Ctrl-C"])
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_that_ends_in_a_wait_has_a_checkpoint_and_goes_on(
    tmp_path: Path, toy_cache: Path, toy_student: Path, gate: Gate, staleness: int, ending: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """No other checkpoint is written, so every step would be lost without the one at the end."""
    monkeypatch.setattr(live_module, "SETTLE_S", 1.0)
    monkeypatch.setitem(LiveRows.__init__.__kwdefaults__, "patience_s", 2.0 if ending != "Ctrl-C" else 60.0)
    options: dict[str, Any] = {
        "cache": str(toy_cache), "student": str(toy_student), "level": "sequence", "student_samples": "live",
        "teacher_url": (gate.url,), "steps": 12, "batch_size": 4, "device": "cpu", "staleness": staleness,
        "save_every": None, "learning_rate": 1e-3, "sample_max_new_tokens": 12,
    }  # fmt: skip

    def lines_of(run: Path) -> list[dict[str, Any]]:
        path = run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    whole, cut = lines_of(train(TrainConfig(out=tmp_path / "whole", **options))), tmp_path / "cut"

    def lose_the_server() -> None:
        while len(lines_of(cut)) < 3:
            time.sleep(0.005)
        gate.shut()
        if ending == "Ctrl-C":
            time.sleep(2)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=lose_the_server, daemon=True).start()
    reason = KeyboardInterrupt if ending == "Ctrl-C" else UserError
    with pytest.raises(reason, match=None if ending == "Ctrl-C" else "no server has answered for 2 s"):
        train(TrainConfig(out=cut, **options))
    done = len(lines_of(cut))
    assert 3 <= done < 12
    assert [path.name for path in cut.glob("checkpoint-*")] == [f"checkpoint-{done}"]
    gate.open()
    train(TrainConfig(out=cut, **options))
    assert [line["loss"] for line in lines_of(cut)] == pytest.approx([line["loss"] for line in whole], abs=1e-4)
