"""Recipes: checked before they run, in order, skipping what is complete; and the shipped ones are sound."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from dpkd.pipelines.cli import app
from dpkd.pipelines.recipe import read_recipe
from dpkd.teacher_cache.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"the recipe has no \[\[steps\]\]"),
        ('name = "x"\n', "unknown key 'name'"),
        ('[[steps]]\ncommand = "dance"\n', "step 1|command is not known: found 'dance'"),
        (
            '[[steps]]\ncommand = "train"\nstudent = "s"\nout = "o"\ncache = "c"\nbeeta = 1\n',
            "unknown option 'beeta'.*step 1",
        ),
    ],
)
def test_a_recipe_is_checked_before_its_first_step(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_recipe(write(tmp_path / "r.toml", content))


def test_every_shipped_recipe_parses_and_says_what_it_takes() -> None:
    recipes = sorted((ROOT / "configs").rglob("*.toml"))
    assert recipes
    for path in recipes:
        assert read_recipe(path)
        header = path.read_text(encoding="utf-8").split("[[steps]]")[0]
        for word in ("Command:", "Hardware:", "Time:", "You will see:"):
            assert word in header, f"{path} promises no {word}"


def recipe_of_toys(directory: Path, teacher: Path, student_out: Path, data: Path) -> str:
    return f"""
[[steps]]
command = "init-student"
teacher = "{teacher}"
out = "{student_out}"
layers = 1

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


def test_a_recipe_runs_once_and_goes_on_where_it_failed(tmp_path: Path, toy_teacher: Path, toy_data: Path) -> None:
    text = recipe_of_toys(tmp_path, toy_teacher, tmp_path / "student", toy_data)
    command = [sys.executable, "-m", "dpkd.pipelines.cli", "run", str(tmp_path / "r.toml")]
    write(tmp_path / "r.toml", text.replace("batch_size = 3", "batch_size = 300"))
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert "a step takes more rows than there are" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "run").exists()

    write(tmp_path / "r.toml", text)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "student is complete" in done.stderr.replace(str(tmp_path) + "/", "")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["complete"] is True
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the recipe" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, toy_teacher: Path, toy_data: Path) -> None:
    recipe = write(tmp_path / "r.toml", recipe_of_toys(tmp_path, toy_teacher, tmp_path / "student", toy_data))
    command = [sys.executable, "-m", "dpkd.pipelines.cli", "run", str(recipe), "--dry-run"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
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
    group = get_command(app)
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
                command, arguments = group, words[1:]
                while hasattr(command, "commands") and arguments and not arguments[0].startswith("-"):
                    assert arguments[0] in command.commands, f"{document}: {line}"
                    command, arguments = command.commands[arguments[0]], arguments[1:]
                options = {name for parameter in command.params for name in parameter.opts}
                flags = [word for word in arguments if word.startswith("--")]
                assert set(flags) <= options | {"--help"}, f"{document}: {line}"
    assert found >= 10


def test_the_shipped_data_are_apart_and_attributed() -> None:
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


def test_the_version_is_said_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
