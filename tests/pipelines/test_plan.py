"""`dpkd plan`: a recipe of toys is timed by a pilot that leaves its outputs alone."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from support.commands import dpkd

from dpkd.core.errors import UserError
from dpkd.distill.options.train import TrainConfig
from dpkd.pipelines.planning.measure import plan_recipe, validation_steps
from dpkd.pipelines.planning.plan import PlannedStep, StepCost
from dpkd.pipelines.planning.processes import in_child

RECIPE = """
[rounds]
count = 2
student = "{out}/first"

[[steps]]
command = "cache-teacher"
teacher = "{teacher}"
data = "{data}"
out = "{out}/cache"
engine = "transformers"
template = "chat"
max_new_tokens = 12
top_k = 8

[[steps]]
command = "train"
cache = "{out}/cache"
student = "{student}"
out = "{out}/first"
steps = 30
batch_size = 4

[[steps]]
repeat = "rounds"
command = "cache-teacher"
teacher = "{teacher}"
student = "{{student}}"
out = "{out}/cache"
round = "r{{round}}"
engine = "transformers"

[[steps]]
repeat = "rounds"
command = "train"
cache = "{out}/cache"
student = "{{student}}"
round = "r{{round}}"
level = "sequence"
out = "{out}/round-{{round}}"
steps = 20
batch_size = 2

[[steps]]
command = "eval"
out = "{out}/report"
engine = "transformers"
template = "chat"
max_new_tokens = 12
seeds = [10, 20]
[steps.model]
teacher = "{teacher}"
trained = "{{student}}"
[steps.data]
d = "{data}"

[[steps]]
command = "judge"
report = "{out}/report"
out = "{out}/judge"
judge_url = "http://127.0.0.1:9"
judge_model = "judge"
"""


@pytest.fixture
def recipe(tmp_path: Path, toy_teacher: Path, toy_student: Path, toy_data: Path) -> Path:
    values = {"teacher": toy_teacher, "student": toy_student, "data": toy_data, "out": tmp_path / "runs"}
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(**values), encoding="utf-8")
    return path


def test_each_step_is_timed_and_nothing_is_left(recipe: Path) -> None:
    planned, costs = plan_recipe(str(recipe), {}, pilot_rows=6)
    assert not (recipe.parent / "runs").exists()
    by_title: dict[str, tuple[PlannedStep, StepCost]] = {
        item.step.title: (item, cost) for item, cost in zip(planned, costs, strict=True)
    }
    assert len(by_title) == 8
    for title, (_, cost) in by_title.items():
        if title == "judge":
            assert cost.seconds is None
            assert "server" in cost.reason
        else:
            assert cost.seconds is not None, cost.reason
            assert 0 < cost.seconds < 60
    # rounds cost the same, and are tried once
    for command in ("cache-teacher", "train"):
        first, second = (by_title[f"{command}, round {number}"][1] for number in (0, 1))
        assert first == second


def test_finished_steps_cost_nothing_and_a_step_that_cannot_run_says_why(recipe: Path, cache_copy: Path) -> None:
    done = recipe.parent / "runs" / "cache"
    done.parent.mkdir()
    shutil.move(cache_copy, done)
    files = sorted(done.rglob("*"))
    recipe.write_text(recipe.read_text().replace("chat", "alpaca"))
    planned, costs = plan_recipe(str(recipe), {}, pilot_rows=6)
    assert planned[0].finished
    assert costs[0] == StepCost(0.0)
    # the second round is estimated on the real cache, and nothing is written there
    assert sorted(done.rglob("*")) == files
    by_title = {item.step.title: cost for item, cost in zip(planned, costs, strict=True)}
    assert by_title["cache-teacher, round 1"].seconds
    assert by_title["train, round 1"] == by_title["train, round 0"]
    # its student was trained with the template of the cache
    assert costs[-2].seconds is None
    assert "another prompt template" in costs[-2].reason


def test_the_command_prints_times_and_the_price(recipe: Path, toy_teacher: Path) -> None:
    first = recipe.read_text().split("[[steps]]")[1].replace(str(toy_teacher), "{teacher}")
    recipe.write_text(f'[inputs]\nteacher = "missing"\n\n[[steps]]{first}')
    untimed = dpkd("plan", recipe)
    assert "not timed: the teacher" in untimed.stdout
    assert "without 1 step that was not timed" in untimed.stdout
    options = ("--set", f"teacher={toy_teacher}", "--pilot-rows", 4, "--price-per-hour", 3600)
    result = dpkd("plan", recipe, *options)
    assert result.returncode == 0, result.stderr
    assert re.search(r"1  to do  cache-teacher -> .*\n.*\n +[\d.]+ s\n", result.stdout)
    hours = float(re.search(r"device hours: (\S+)", result.stdout)[1])  # type: ignore[index]
    price = float(re.search(r"price: (\S+),", result.stdout)[1])  # type: ignore[index]
    assert price == pytest.approx(hours * 3600, rel=0.05)
    assert "TFLOP" not in result.stdout


def test_several_caches_with_weights_are_timed(recipe: Path) -> None:
    _, cache, train = recipe.read_text().split("[[steps]]")[:3]
    runs = recipe.parent / "runs"
    other = cache.replace("runs/cache", "runs/other")
    train = train.replace(f'"{runs}/cache"', f'["{runs}/cache=0.7", "b:{runs}/other=0.3"]')
    recipe.write_text("[[steps]]".join(["", cache, other, train]))
    _, costs = plan_recipe(str(recipe), {}, pilot_rows=4)
    assert [cost.reason for cost in costs] == ["", "", ""]


def test_an_endpoint_is_asked_nothing(recipe: Path) -> None:
    cache = (
        recipe.read_text()
        .split("[[steps]]")[1]
        .replace(
            'engine = "transformers"', 'engine = "openai"\nteacher_url = "http://127.0.0.1:9/v1"\nteacher_model = "m"'
        )
    )
    recipe.write_text(f"[[steps]]{cache}")
    _, (cost,) = plan_recipe(str(recipe), {}, pilot_rows=4)
    assert cost.seconds is None
    assert "cost money" in cost.reason


def test_validations_are_counted_in_steps() -> None:
    config = TrainConfig(cache="c", student="s", out=Path("o"), validate_every=10, batch_size=4)
    # before training and after each ten of 100 steps, 24 rows at a third of the cost of training on them
    assert validation_steps(config, 100, 24, 4) == pytest.approx(11 * 24 / 4 / 3)
    assert validation_steps(config, 100, 0, 4) == 0


def _wait_for(path: Path) -> None:
    path.with_suffix(".pid").write_text(str(os.getpid()))
    time.sleep(600)


def _be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_interrupt_ends_the_process_of_a_pilot(tmp_path: Path) -> None:
    mark = tmp_path / "child"

    def interrupt() -> None:
        while not mark.with_suffix(".pid").is_file():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        in_child(_wait_for, mark)
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.with_suffix(".pid").read_text()), 0)


def test_a_pilot_has_the_environment_of_this_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPKD_OF_A_TEST", "1")
    assert in_child(os.getenv, "DPKD_OF_A_TEST") == "1"
    monkeypatch.delenv("DPKD_OF_A_TEST")
    assert in_child(os.getenv, "DPKD_OF_A_TEST") is None


def test_a_killed_process_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="its process was killed, perhaps for memory"):
        in_child(_be_killed)
