"""Recipes: checked before they run, run in order, skipping finished steps; and the shipped ones are valid."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from support.commands import Command, dpkd, fork_steps
from support.toys import ROOT

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource
from dpkd.pipelines.commands.registry import COMMANDS, STEPS
from dpkd.pipelines.flags import add_command
from dpkd.pipelines.recipe.format import read_recipe
from dpkd.pipelines.recipe.run import _wait, run_steps
from dpkd.pipelines.recipe.shipped import shipped_recipes
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.reader import TeacherCache


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"the recipe has no \[\[steps\]\]"),
        ('name = "x"\n', "unknown key 'name'"),
        ('[[steps]]\ncommand = "dance"\n', "unknown command of a step: found 'dance' .*step 1"),
        (
            '[[steps]]\ncommand = "train"\nstudent = "s"\nout = "o"\ncache = "c"\nbeeta = 1\n',
            "unknown option `beeta` .did you mean `beta`.. .in .*step 1",
        ),
    ],
)
def test_a_recipe_is_checked_before_its_first_step(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_recipe(write(tmp_path / "r.toml", content))


def test_every_shipped_recipe_parses_and_says_what_it_takes() -> None:
    assert {path.resolve() for path in shipped_recipes().values()} == set((ROOT / "recipes").rglob("*.toml"))
    for name, path in shipped_recipes().items():
        assert read_recipe(name) == read_recipe(path)
        header = path.read_text(encoding="utf-8").split("[[steps]]")[0]
        assert re.match(r"# [A-Z].{20,110}\.\n", header), f"{path} begins with no sentence that says what it does"
        for word in ("Command:", "Hardware:", "Time:", "You will see:"):
            assert word in header, f"{path} promises no {word}"


def test_the_rounds_of_shipped_recipes_say_what_their_caches_say() -> None:
    """A round takes these options from its cache, and refuses others only once the cache is built."""
    taken = (
        "dtype", "template", "limit", "responses", "num_samples", "max_prompt_tokens", "rows_per_shard", "turns",
        "thinking", "template_arg",
    )  # fmt: skip
    num_rounds = 0
    for name in shipped_recipes():
        configs = [step.config for step in read_recipe(name)]
        made = [config for config in configs if isinstance(config, CacheConfig)]
        caches = {config.out: config for config in made if config.round is None}
        for config in made:
            if config.round is None:
                continue
            num_rounds += 1
            for key in config.model_fields_set.intersection(taken):
                assert getattr(config, key) == getattr(caches[config.out], key), (name, config.round, key)
    assert num_rounds > 100


ROUNDS = """
[rounds]
count = 3
student = "start"

[[steps]]
command = "init-student"
teacher = "t"
out = "{student}"
layers = 1
keep = "last"

[[steps]]
repeat = "rounds"
command = "cache-teacher"
teacher = "t"
student = "{student}"
out = "cache"
round = "r{round}"
engine_arg = ["speculative_config={\\"n\\": 1}"]

[[steps]]
repeat = "rounds"
command = "train"
cache = "cache"
student = "{student}"
level = "sequence"
round = "r{round}"
out = "runs/round-{next}"

[[steps]]
command = "eval"
out = "report"

[steps.model]
first = "runs/round-1"
last = "{student}"

[steps.data]
held = "heldout.jsonl"
"""


def test_rounds_are_written_out_step_by_step(tmp_path: Path) -> None:
    steps = read_recipe(write(tmp_path / "r.toml", ROUNDS))
    assert [step.title for step in steps] == [
        "init-student",
        "cache-teacher, round 0", "train, round 0",
        "cache-teacher, round 1", "train, round 1",
        "cache-teacher, round 2", "train, round 2",
        "eval",
    ]  # fmt: skip
    options = [step.config.model_dump(mode="json") for step in steps]
    assert options[0]["out"] == "start"
    students = ["start", "runs/round-1", "runs/round-2"]
    for number, student in enumerate(students):
        asked, learnt = options[1 + 2 * number], options[2 + 2 * number]
        assert (asked["student"], asked["round"], asked["out"]) == (student, f"r{number}", "cache")
        assert (learnt["student"], learnt["round"]) == (student, f"r{number}")
        assert learnt["out"] == f"runs/round-{number + 1}"
        assert asked["engine_arg"] == {"speculative_config": '{"n": 1}'}  # braces that hold no placeholder
    assert options[-1]["model"] == {"first": "runs/round-1", "last": "runs/round-3"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("count = 3", "count = 0", r"`count` must be 1 or more, found 0 .*\[rounds\]"),
        ("count = 3", "cuont = 3", "unknown option `cuont` .did you mean `count`..; `count` is required"),
        ('[rounds]\ncount = 3\nstudent = "start"', "rounds = 3", r"`rounds` is not a table: expected \[rounds\]"),
        (
            '[rounds]\ncount = 3\nstudent = "start"',
            "",
            r"a step is repeated, but the recipe has no \[rounds\] .*step 2",
        ),
        ('repeat = "rounds"\n', "", "no step is repeated .*Mark the steps of a round with repeat"),
        ('repeat = "rounds"', 'repeat = "round"', "unknown `repeat`: found 'round', expected 'rounds' .*step 2"),
        (
            'command = "eval"',
            'command = "eval"\nrepeat = "rounds"',
            "the step writes the same output in rounds 0 and 1: ",
        ),
        ("runs/round-{next}", "runs/round", "the same output in rounds 0 and 1: found runs/round .*step 3, round 1"),
        ('out = "cache"\nround = "r{round}"', 'out = "cache"\nround = "r"', "found cache, round r .*step 2, round 1"),
        (
            "runs/round-{next}",
            "runs/{rounds}",
            r"placeholder \{rounds\} has no value here: expected \{student\}, \{round\}",
        ),
        (
            'out = "report"',
            'out = "report-{round}"',
            r"\{round\} has no value here: expected \{student\}, \{recipes\}, \{examples\} .*step 4",
        ),
        (
            'last = "{student}"',
            'last = "{studnt}"',
            r"\{studnt\} has no value here: expected \{student\}, \{recipes\}, .*step 4",
        ),
        ('level = "sequence"', 'level = "token"\nbeeta = 1', "unknown option `beeta` .*step 3, round 0"),
    ],
)
def test_rounds_are_checked_before_the_first_step(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in ROUNDS
    with pytest.raises(UserError, match=message):
        read_recipe(write(tmp_path / "r.toml", ROUNDS.replace(old, new)))


def test_the_steps_of_a_round_are_adjacent_and_train(tmp_path: Path) -> None:
    train_only = ROUNDS.replace('repeat = "rounds"\ncommand = "cache-teacher"', 'command = "cache-teacher"')
    apart = train_only.replace('command = "init-student"', 'command = "init-student"\nrepeat = "rounds"')
    with pytest.raises(UserError, match=r"a step that runs once is between the steps of a round .*step 2"):
        read_recipe(write(tmp_path / "r.toml", apart))
    idle = ROUNDS.replace('repeat = "rounds"\ncommand = "train"', 'command = "train"')
    with pytest.raises(UserError, match="a round has no train step, so its student would stay the same"):
        read_recipe(write(tmp_path / "r.toml", idle))


def test_a_placeholder_without_rounds_is_refused(tmp_path: Path) -> None:
    plain = '[[steps]]\ncommand = "init-student"\nteacher = "t"\nout = "{student}"\nlayers = 1\nkeep = "last"\n'
    with pytest.raises(UserError, match=r"\{student\} has no value here: expected \{recipes\}, \{examples\} "):
        read_recipe(write(tmp_path / "r.toml", plain))


def weights_of(model: Path) -> str | None:
    return ModelSource(str(model), model).identity("float32")["weights_sha256"]


def test_rounds_go_on_after_a_kill_and_each_starts_from_the_one_before(
    tmp_path: Path, cache_copy: Path, toy_teacher: Path, toy_student: Path
) -> None:
    text = f"""
[rounds]
count = 2
student = "{toy_student}"

[[steps]]
repeat = "rounds"
command = "cache-teacher"
teacher = "{toy_teacher}"
student = "{{student}}"
out = "{cache_copy}"
round = "live-{{round}}"
engine = "transformers"
max_new_tokens = 6
top_k = 8

[[steps]]
repeat = "rounds"
command = "train"
cache = "{cache_copy}"
student = "{{student}}"
round = "live-{{round}}"
out = "{tmp_path}/round-{{round}}"
level = "sequence"
steps = 2
batch_size = 4
learning_rate = 1e-2
device = "cpu"
"""
    command = ["run", str(write(tmp_path / "r.toml", text))]
    first = tmp_path / "round-0"
    process = Command(*command, prepare=fork_steps)
    deadline_s = time.monotonic() + 240
    while f"starting transformers with the student {first}\n" not in process.stderr:  # step 3
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    killed = process.finish()
    assert killed.returncode == 130, killed.stderr
    assert (first / "run.json").is_file()
    assert not (tmp_path / "round-1").exists()
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}

    assert dpkd(*command).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()} == before
    cache = TeacherCache.open(cache_copy)
    students = [toy_student, first, tmp_path / "round-1"]
    assert len({weights_of(student) for student in students}) == 3
    for number in range(2):
        held = cache.round(f"live-{number}").manifest.identities["student"]
        run = json.loads((students[number + 1] / "dpkd-run.json").read_text())
        assert held["weights_sha256"] == run["student"]["weights_sha256"] == weights_of(students[number])


def recipe_of_toys(directory: Path, teacher: Path, student_out: Path, data: Path) -> str:
    return f"""
[[steps]]
command = "init-student"
teacher = "{teacher}"
out = "{student_out}"
layers = 1
keep = "last"

[[steps]]
command = "cache-teacher"
teacher = "{teacher}"
data = "{data}"
out = "{directory}/cache"
engine = "transformers"
template = "chat"
max_new_tokens = 6
top_k = 8
limit = 6

[[steps]]
command = "train"
cache = "{directory}/cache"
student = "{student_out}"
out = "{directory}/run"
steps = 2
batch_size = 3
"""


def test_a_round_that_an_alarm_ends_is_followed_by_the_next(
    tmp_path: Path, cache_copy: Path, toy_teacher: Path, toy_student: Path
) -> None:
    """Eq. 9 without anchor at a high rate overshoots its round; the recipe goes on, and a repeated run does nothing."""
    text = f"""
[rounds]
count = 2
student = "{toy_student}"

[[steps]]
repeat = "rounds"
command = "cache-teacher"
teacher = "{toy_teacher}"
student = "{{student}}"
out = "{cache_copy}"
round = "alarm-{{round}}"
engine = "transformers"
max_new_tokens = 6
top_k = 0

[[steps]]
repeat = "rounds"
command = "train"
cache = "{cache_copy}"
student = "{{student}}"
round = "alarm-{{round}}"
out = "{tmp_path}/round-{{round}}"
level = "sequence"
label_smoothing = 0.0
kd_weight = 0.0
steps = 40
batch_size = 8
learning_rate = 1e-2
validation_examples = 4
validate_every = 4
on_alarm = "stop"
device = "cpu"
"""
    steps = read_recipe(write(tmp_path / "r.toml", text))
    run_steps(steps, "r")
    ends = [json.loads((tmp_path / f"round-{number}" / "run.json").read_text()) for number in range(2)]
    assert ends[0]["stopped_by_alarm"] is True
    assert ends[0]["steps"] < 40
    run_steps(steps, "r")


def test_a_step_that_the_system_kills_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    step = multiprocessing.get_context("fork").Process(target=lambda: os.kill(os.getpid(), signal.SIGKILL))
    step.start()
    assert _wait(step) == 130
    assert "the step was killed (SIGKILL), perhaps because memory ran out" in capsys.readouterr().err


@pytest.fixture
def long_training(tmp_path: Path, toy_cache: Path, toy_student: Path) -> Iterator[subprocess.Popen[str]]:
    """`dpkd run` with a forkserver of its own, in a process group of its own, while its one step trains into `run`."""
    recipe = f"""
[[steps]]
command = "train"
cache = "{toy_cache}"
student = "{toy_student}"
out = "{tmp_path}/run"
steps = 1000000
save_every = "none"
validation_examples = 0
batch_size = 4
device = "cpu"
"""
    words = [sys.executable, "-m", "dpkd.pipelines.cli", "run", str(write(tmp_path / "r.toml", recipe))]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline_s = time.monotonic() + 240
        log = tmp_path / "run" / "metrics.jsonl"
        while not log.is_file() or not log.stat().st_size:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def checkpoints(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("checkpoint-*"))


def forked_of(pid: int) -> int:
    """The child of `pid` that is a forkserver, or of a forkserver the process that it has forked."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == pid and "forkserver" in (stat.parent / "cmdline").read_text():
                return int(stat.parent.name)
    raise AssertionError(f"{pid} has no such child")


def test_a_signal_to_the_whole_group_ends_the_recipe_after_its_steps_checkpoint(
    tmp_path: Path, long_training: subprocess.Popen[str]
) -> None:
    step = forked_of(forked_of(long_training.pid))
    os.kill(step, signal.SIGSTOP)  # a step that takes long to end
    os.killpg(long_training.pid, signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        long_training.wait(2)
    os.kill(step, signal.SIGCONT)
    assert long_training.wait(120) == 130
    assert len(checkpoints(tmp_path / "run")) == 1
    assert "interrupted: finishing this step and writing a checkpoint" in long_training.communicate(timeout=60)[1]


@pytest.mark.parametrize("victim", ["recipe", "forkserver"])
def test_a_step_ends_with_a_checkpoint_when_what_started_it_is_killed(
    tmp_path: Path, long_training: subprocess.Popen[str], victim: str
) -> None:
    os.kill(long_training.pid if victim == "recipe" else forked_of(long_training.pid), signal.SIGKILL)
    stderr = long_training.communicate(timeout=60)[1]  # to the end of the last process that writes to it
    assert len(checkpoints(tmp_path / "run")) == 1
    assert "run the same command again to resume" in stderr
    assert long_training.returncode == (-signal.SIGKILL if victim == "recipe" else 130)


def test_a_recipe_runs_once_and_resumes_where_it_failed(tmp_path: Path, toy_teacher: Path, toy_data: Path) -> None:
    text = recipe_of_toys(tmp_path, toy_teacher, tmp_path / "student", toy_data)
    command = ["run", str(tmp_path / "r.toml")]
    write(tmp_path / "r.toml", text.replace("batch_size = 3", "batch_size = 300"))
    failed = Command(*command, prepare=fork_steps).finish()
    assert failed.returncode == 2
    assert "a step takes more rows than there are" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "run").exists()

    write(tmp_path / "r.toml", text)
    done = Command(*command, prepare=fork_steps).finish()
    assert done.returncode == 0, done.stderr
    assert "student is complete" in done.stderr.replace(str(tmp_path) + "/", "")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["complete"] is True
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = dpkd(*command)
    assert again.returncode == 0
    assert "the recipe" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, toy_teacher: Path, toy_data: Path) -> None:
    recipe = write(tmp_path / "r.toml", recipe_of_toys(tmp_path, toy_teacher, tmp_path / "student", toy_data))
    result = dpkd("run", recipe, "--dry-run")
    assert [line for line in result.stdout.splitlines() if line.startswith("# ")] == [
        "# init-student", "# cache-teacher", "# train",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]


def test_scripts_are_sound_shell() -> None:
    scripts = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
    assert len(scripts) == 5
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_every_command_of_the_documents_is_one_that_exists() -> None:
    """Each `dpkd ...` line in a shell block parses against the real command line; each script is there."""
    found = 0
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["bash"]:
                    assert (ROOT / words[1]).is_file(), f"{document}: {line}"
                    found += 1
                if words[:1] != ["dpkd"]:
                    continue
                found += 1
                name = " ".join(words[1:3] if words[1] == "cache" else words[1:2])
                flags = {word for word in words if word.startswith("--")}
                options = {"--version"}
                if not name.startswith("-"):
                    assert name in COMMANDS, f"{document}: {line}"
                    app = typer.Typer()
                    add_command(app, "command", COMMANDS[name])
                    parameters = typer.main.get_command(app).params
                    options = {flag for one in parameters for flag in (*one.opts, *one.secondary_opts)}
                assert flags <= options | {"--help"}, f"{document}: {line}"
    assert found >= 10


def test_the_shipped_data_do_not_overlap_and_are_attributed() -> None:
    rows = {
        name: [json.loads(line) for line in (ROOT / "examples" / "dolly" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    }
    keys = {name: {(row["instruction"], row["input"]) for row in part} for name, part in rows.items()}
    assert len(rows["train"]) == 320
    assert len(rows["heldout"]) == 96
    assert not keys["train"] & keys["heldout"]
    readme = (ROOT / "examples" / "dolly" / "README.md").read_text()
    assert "databricks-dolly-15k" in readme
    assert "CC BY-SA 3.0" in readme


def test_the_version_is_in_the_changelog() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version, _, dev = project["version"].partition(".dev")
    heading = f"## {version} (unreleased)" if dev else f"## {version}"
    assert f"\n{heading}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_parent_of_recipe_steps_touches_no_device() -> None:
    """A forked process cannot use a GPU if its parent has even counted the GPUs."""
    code = (
        "import importlib, torch\n"
        "from dpkd.pipelines.recipe.forking import PRELOAD\n"
        "asked = []\n"
        "for name in ('is_available', 'device_count', 'init', '_lazy_init'):\n"
        "    setattr(torch.cuda, name, lambda *_, name=name, **__: asked.append(name))\n"
        "torch.accelerator.is_available = lambda: asked.append('accelerator')\n"
        "torch.cuda.is_available()\n"
        "for name in PRELOAD:\n"
        "    importlib.import_module(name)\n"
        "print(asked)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "['is_available']"  # the test's own question


def test_caches_are_imported_merged_and_filtered_by_a_recipe(
    tmp_path: Path, toy_teacher: Path, toy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command with an `out` is a step, and a plan times those that make caches of caches."""
    assert {name for name, command in COMMANDS.items() if "out" in command.options_class().model_fields} - {
        "run", "reproduce"
    } == {command.name for command in STEPS}  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(toy_data, tmp_path / "rows.jsonl")
    teach = f"""
[[steps]]
command = "cache-teacher"
teacher = "{toy_teacher}"
data = "rows.jsonl"
engine = "transformers"
device = "cpu"
max_new_tokens = 6
top_k = 4
limit = 5
"""
    text = f"""{teach}seed = 1
out = "first"
{teach}seed = 2
out = "second"

[[steps]]
command = "cache merge"
caches = ["first", "second"]
duplicates = "renumber"
out = "both"

[[steps]]
command = "cache filter"
cache = "both"
where = ["sample == 1"]
out = "kept"
"""
    recipe = write(tmp_path / "r.toml", text)
    plan = dpkd("plan", recipe)
    assert plan.returncode == 0, plan.stderr
    assert "10 rows of 2 caches" in plan.stdout
    assert "10 rows at most of both" in plan.stdout
    assert "not timed" not in plan.stdout
    assert not (tmp_path / "both").exists()
    run_steps(read_recipe(recipe), "r")
    both, kept = TeacherCache.open("both"), TeacherCache.open("kept")
    assert (both.manifest.counts["rows"], kept.manifest.counts["rows"]) == (10, 5)
    # the commands by hand make the same
    assert dpkd("cache", "merge", "first", "second", "--duplicates", "renumber", "--out", "by-hand").returncode == 0
    assert TeacherCache.open("by-hand").manifest.shards == both.manifest.shards
    before = Path("kept/manifest.json").stat().st_mtime_ns
    run_steps(read_recipe(recipe), "r")
    assert Path("kept/manifest.json").stat().st_mtime_ns == before
