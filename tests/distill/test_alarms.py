"""Alarms: each is given by a real run that goes wrong in that way, and a run that goes well gives none."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from support.reference import entries_of, read_rows
from torch.nn import functional
from transformers import AutoModelForCausalLM

from dpkd.core.errors import UserError
from dpkd.distill.batches.batch import MicroBatch
from dpkd.distill.batches.collate import collate
from dpkd.distill.objectives.gradient_share import gradient_norms, preference_share
from dpkd.distill.objectives.objective import Objective
from dpkd.distill.objectives.student_forward import StudentScorer
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.sources import CacheRows
from dpkd.distill.run.alarms import Alarms, Watch, find_alarms, teacher_entropy
from dpkd.distill.training import train
from dpkd.pipelines.cli import run as command_line
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.reader import TeacherCache

COMMON: dict[str, Any] = {
    "steps": 40, "batch_size": 16, "learning_rate": 2e-3, "validate_every": 20, "save_every": None, "device": "cpu",
    "responses": "teacher", "tracker": "none",
}  # fmt: skip
ROUND = {"level": "sequence", "round": "r0"}


def config(out: Path, cache: Path, student: Path, **options: Any) -> TrainConfig:
    return TrainConfig(out=out, cache=str(cache), student=str(student), **(COMMON | options))


def alarms_of(run: Path) -> list[dict[str, Any]]:
    path = run / "alarms.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"token_pairs": "drawn"},
        ROUND,
        ROUND | {"steps": 80, "learning_rate": 5e-3},
        {"objective": "forward-kl"},
        {"objective": "seqkd"},
        {"preset": "released-code", "lm_weight": 0.0, "best_metric": None},
    ],
    ids=str,
)
def test_a_run_that_goes_well_gives_no_alarm(
    tmp_path: Path, world: dict[str, Path], options: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    run = train(config(tmp_path / "run", world["cache"], world["student"], **options))
    assert alarms_of(run) == []
    assert json.loads((run / "run.json").read_text())["alarms"] == []
    assert "alarm" not in capfd.readouterr().err


def test_the_released_loss_alone_gives_three_alarms_and_the_run_can_stop(
    tmp_path: Path, world: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Both arg-maxes and nothing else: KL and entropy rise, log q of both tokens falls (docs/objectives.md)."""
    options = config(tmp_path / "run", world["cache"], world["student"], token_pairs="argmax")
    run = train(options)
    said = capfd.readouterr().err
    found = alarms_of(run)
    assert [alarm["name"] for alarm in found] == ["kl-worse", "entropy-rises", "both-fall"]
    start, line, _ = (json.loads(text) for text in (run / "validation.jsonl").read_text().splitlines())
    assert found[0]["figures"] == {"kld_start": start["kld"], "kld": line["kld"]}
    assert found[2]["figures"]["chosen_fall"] == start["reward_chosen"] - line["reward_chosen"]
    for alarm in found:
        assert alarm["step"] == 20
        assert said.count(f"alarm at step 20: {alarm['text']}") == 1
    facts = json.loads((run / "run.json").read_text())
    assert facts["alarms"] == ["kl-worse", "entropy-rises", "both-fall"]
    assert (facts["steps"], facts["stopped_by_alarm"]) == (40, False)
    assert f"is complete: 40 steps, 3 alarms ({run / 'alarms.jsonl'})" in said

    # the same command with --on-alarm stop ends at the first one, with the student of that step as its result
    asked = options.model_copy(update={"out": tmp_path / "stopped", "on_alarm": "stop"})
    file = tmp_path / "stop.toml"
    file.write_text(asked.to_toml())
    for _ in range(2):  # the second time it is complete, and its exit code still says how it ended
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            assert command_line(["train", "--config", str(file)]) == 3
    facts = json.loads((asked.out / "run.json").read_text())
    assert (facts["steps"], facts["student_step"], facts["stopped_by_alarm"]) == (20, 20, True)
    AutoModelForCausalLM.from_pretrained(asked.out)


def test_a_resumed_run_repeats_no_alarm(
    tmp_path: Path, world: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    options = config(tmp_path / "run", world["cache"], world["student"], token_pairs="argmax", save_every=30)
    run = train(options)
    whole = (run / "alarms.jsonl").read_bytes()
    (run / "run.json").unlink()
    (run / "best").mkdir()
    for name in ("model.safetensors", "config.json", "dpkd.json"):
        (run / name).rename(run / "best" / name)
    capfd.readouterr()
    train(options)
    assert "alarm at" not in capfd.readouterr().err
    assert (run / "alarms.jsonl").read_bytes() == whole
    assert len(json.loads((run / "run.json").read_text())["alarms"]) == 3


def test_a_used_up_round(tmp_path: Path, world: dict[str, Path]) -> None:
    """Eq. 9 alone on a fixed round: its held-out margin passes 0, and KL rises from there on."""
    options = {"kd_weight": 0.0, "label_smoothing": 0.0, "steps": 60, "learning_rate": 5e-3, "validate_every": 15}
    run = train(config(tmp_path / "run", world["cache"], world["student"], **ROUND, **options))
    lines = [json.loads(text) for text in (run / "validation.jsonl").read_text().splitlines()]
    (alarm,) = [alarm for alarm in alarms_of(run) if alarm["name"] == "round-used-up"]
    first = next(line for line in lines if line["reward_margin"] >= 0)
    assert alarm["step"] == first["step"] > 0
    assert lines[0]["reward_margin"] < 0
    assert "the round is used up: the margin on held-out pairs went from " in alarm["text"]
    assert lines[-1]["reward_margin"] > first["reward_margin"]


def test_an_idle_preference(tmp_path: Path, world: dict[str, Path]) -> None:
    """Beta 0.1 of a loss that is divided by length, next to a divergence of weight 1."""
    run = train(config(tmp_path / "run", world["cache"], world["student"], **ROUND, beta=0.1))
    (alarm,) = alarms_of(run)
    assert (alarm["name"], alarm["step"]) == ("small-preference", 20)
    assert 0 < alarm["figures"]["preference_share"] < 0.05


def test_a_student_that_says_one_thing_only(
    tmp_path: Path, toy_teacher: Path, toy_student: Path, write_rows: Callable[..., Path]
) -> None:
    """Every reference is the same word: the student gets surer of it than the teacher ever is."""
    data = write_rows([{"instruction": f"Say {number}.", "output": "Yes, yes, yes, yes."} for number in range(24)])
    options: dict[str, Any] = {"engine": "transformers", "device": "cpu", "template": "chat", "top_k": 256}
    build_cache(
        CacheConfig(teacher=str(toy_teacher), data=str(data), out=tmp_path / "cache", responses="reference", **options)
    )
    run = train(
        config(
            tmp_path / "run", tmp_path / "cache", toy_student, objective="sft", responses="reference",
            learning_rate=1e-2, batch_size=8,
        )
    )  # fmt: skip
    names = [alarm["name"] for alarm in alarms_of(run)]
    assert names == ["kl-worse", "entropy-falls"]
    start, *_, last = (json.loads(text) for text in (run / "validation.jsonl").read_text().splitlines())
    assert last["entropy"] < 0.5 < start["entropy"]


def test_the_bounds_of_the_teachers_entropy(toy_cache: Path, toy_teacher: Path) -> None:
    """Around the entropy of the teacher's full distribution."""
    cache = TeacherCache.open(toy_cache)
    low, high = teacher_entropy(CacheRows(cache, cache.shards()), cache.vocab_size) or (math.nan, math.nan)
    model = AutoModelForCausalLM.from_pretrained(toy_teacher).double().eval()
    values, lower = [], []
    for row, _ in read_rows(cache, None):
        ids = torch.tensor([[*row.prompt_ids.tolist(), *row.response_ids.tolist()]])
        with torch.no_grad():
            log_p_TV = model(ids).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
        values += (-(log_p_TV.exp() * log_p_TV).sum(-1)).tolist()
        for entries, tail in entries_of(row):
            lower.append(-sum(math.exp(log_p) * log_p for log_p in [*entries.values(), tail]))
    mean = sum(values) / len(values)
    assert low < mean < high
    assert math.isclose(low, sum(lower) / len(lower), rel_tol=1e-6)


def test_the_gradient_of_each_term_is_measured_where_it_enters_the_head(world: dict[str, Path]) -> None:
    """Against the gradient at the hidden states by plain torch, for the forward KL and for a pair's loss."""
    options = config(Path("out"), world["cache"], world["student"], **ROUND, kd_weight=0.3)
    cache = TeacherCache.open(world["cache"])
    rows = CacheRows(cache, cache.shards("teacher"), cache.round("r0"))
    row = rows.row(0, 1)
    assert row.rejected is not None
    model = AutoModelForCausalLM.from_pretrained(world["student"]).eval()
    objective = Objective(options, cache.vocab_size)
    scorer = StudentScorer(model, num_tokens=600, logits_chunk=4)  # in chunks, which are computed again
    kept: list[bool] = []  # by the layers, for a backward pass
    layer = model.get_decoder().layers[0].register_forward_hook(lambda *_: kept.append(torch.is_grad_enabled()))
    norms = gradient_norms(objective, scorer, MicroBatch(collate([row], with_distributions=True)))
    layer.remove()
    assert kept == [False]
    assert all(parameter.grad is None for parameter in model.parameters())

    hidden, logs = [], []
    for part in (row.chosen, row.rejected):
        ids = torch.tensor([[*part.prompt_ids.tolist(), *part.response_ids.tolist()]])
        hidden.append(model.get_decoder()(ids)[0][0, len(part.prompt_ids) - 1 : -1].detach().requires_grad_())
        logs.append(model.get_output_embeddings()(hidden[-1]).log_softmax(-1))
    kld = torch.zeros(())
    for log_q_V, (entries, tail) in zip(logs[0], entries_of(row.chosen), strict=True):
        ids = torch.tensor(list(entries))
        q = torch.cat([log_q_V[ids].exp(), (1 - log_q_V[ids].exp().sum())[None]])
        p = torch.tensor([*entries.values(), tail]).softmax(0)
        kld = kld + (p * (p / q).log())[p > 1e-30].sum() / len(logs[0])
    rewards = []
    for log_q_TV, part in zip(logs, (row.chosen, row.rejected), strict=True):
        targets = torch.tensor(part.response_ids.tolist())
        log_p = float(part.response_logprobs.sum())
        rewards.append((log_q_TV.gather(1, targets[:, None]).sum() - log_p) / len(targets))
    pair = -functional.logsigmoid(rewards[0] - rewards[1]) / 2 - functional.logsigmoid(rewards[1] - rewards[0]) / 2
    for name, loss in (("kd", 0.3 * kld), ("dpkd", pair)):
        gradients = torch.autograd.grad(loss, hidden, retain_graph=True, allow_unused=True)
        norm = float(torch.cat([part.flatten() for part in gradients if part is not None]).norm())
        assert math.isclose(norms[name], norm, rel_tol=2e-3), name
    assert preference_share(norms) == norms["dpkd"] / (norms["dpkd"] + norms["kd"])
    assert preference_share({"dpkd": 1.0}) is None


def test_noise_gives_no_alarm_and_each_is_given_once() -> None:
    """Figures a hair beyond and within each bound."""
    start = {"kld": 2.0, "entropy": 3.0, "reward_margin": -1.0}
    round_watch = Watch(beta=1.0, pairs="round", teacher_entropy=(2.0, 2.5))
    assert find_alarms(start, start | {"kld": 2.04}, round_watch) == []
    assert [alarm.name for alarm in find_alarms(start, start | {"kld": 2.06}, round_watch)] == ["kl-worse"]
    # far from the teacher, an unsure student is right to be unsure
    assert find_alarms(start, start | {"entropy": 5.4}, round_watch) == []
    assert [alarm.name for alarm in find_alarms(start, start | {"entropy": 5.6}, round_watch)] == ["entropy-rises"]
    # ends: the study's start, and what forward KL and distillm2 make of it in 36 steps (docs/results/rounds.md)
    start |= {"end_gap": -1.6}
    assert find_alarms(start, start | {"end_gap": -1.4}, round_watch) == []
    assert find_alarms(start, start | {"end_gap": -4.5}, round_watch) == []
    assert [alarm.name for alarm in find_alarms(start, start | {"end_gap": -8.0}, round_watch)] == ["end-unlearned"]
    # a student that ends too readily has 3 nats more to fall
    assert find_alarms(start | {"end_gap": 2.0}, start | {"end_gap": -2.9}, round_watch) == []
    assert find_alarms(start, start | {"reward_margin": -1e-3}, round_watch) == []
    assert find_alarms(start, start | {"reward_margin": 0.5}, Watch(pairs="tokens")) == []
    alarms = Alarms()
    assert alarms.note(start, round_watch) == []
    assert [alarm.name for alarm in alarms.note(start | {"kld": 3.0}, round_watch)] == ["kl-worse"]
    assert alarms.note(start | {"kld": 4.0}, round_watch) == []
    assert [alarm.name for alarm in Alarms(**asdict(alarms)).note(start | {"kld": 5.0}, round_watch)] == []


@pytest.mark.parametrize("options", [{"validation_examples": 0}, {"follow": True}])
def test_stopping_needs_validation(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"--on-alarm stop needs|--on-alarm needs"):
        TrainConfig.parse({"cache": "c", "student": "s", "out": "o", "on_alarm": "stop"} | options, where="here")
