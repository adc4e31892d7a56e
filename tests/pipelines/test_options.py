"""Every option of every command: in `--help` with its default, read somewhere, and refused in plain words."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import ValidationError
from support.commands import dpkd
from support.toys import ROOT

from dpkd.core.errors import UserError
from dpkd.pipelines.cli import make_app
from dpkd.pipelines.commands.registry import COMMANDS, Command
from dpkd.pipelines.recipe.format import read_recipe

OPTIONS = [(name, key) for name, command in COMMANDS.items() for key in command.options_class().model_fields]
#: options whose name `TrainConfig.weights` puts together, and that property
BY_NAME = {f"{term}_weight": "weights" for term in ("dpkd", "sft", "kd", "lm", "minillm")}
#: options that the command line itself reads
BY_FLAGS = {"dry_run"}


def output_of(*arguments: str) -> tuple[int, str]:
    """The exit code, and what the command printed."""
    result = dpkd(*arguments)
    return result.returncode, result.stdout + result.stderr


def names_read(source: str, *, in_options: bool = False) -> set[str]:
    """Names that a file reads as attributes, or as texts for `getattr`; of a file of options without its validators."""
    found = set()

    def visit(node: ast.AST) -> None:
        if in_options and isinstance(node, ast.FunctionDef):
            decorators = ast.dump(ast.Module(node.decorator_list, []))
            if "validator" in decorators or node.name.startswith("_"):
                return
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not in_options:
            found.add(node.value)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def dead_options(keys: set[str], sources: dict[Path, str]) -> set[str]:
    """Options that no file reads: neither directly nor through a property of the options that does something else."""
    read: set[str] = set()
    for path, source in sources.items():
        read |= names_read(source, in_options="options" in path.parts or path.name == "options.py")
    by_name = {key for key, text in BY_NAME.items() if text in read}
    return keys - read - by_name


def source_files() -> dict[Path, str]:
    packages = ("core", "teacher_cache", "distill", "evaluate", "pipelines")
    return {path: path.read_text() for package in packages for path in (ROOT / package).rglob("*.py")}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_every_option_with_its_text_and_default(name: str) -> None:
    code, page = output_of(*name.split(), "--help")
    assert code == 0
    words = " ".join(page.split())
    options = COMMANDS[name].options_class()
    for key, field in options.model_fields.items():
        assert field.description, key
        assert re.search(rf"^  {re.escape(options.flag(key))}( |$)", page, flags=re.M), key
        # the form of a value, such as NAME=DIR, is shown next to the flag
        shown = re.escape(" ".join(re.sub(r"^[A-Z]+=[\w.]+: ", "", field.description).split()))
        end = "required" if field.is_required() else "default: [^\\]]+"
        assert re.search(rf"{shown}(; one of [^\[]+)? \[{end}\]", words), key
    assert options.example.startswith(f"dpkd {name} ")
    assert options.example in words


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_each_command_is_valid(name: str) -> None:
    words = shlex.split(COMMANDS[name].options_class().example)[1:]
    if name == "plan":  # it has no dry run: it is one, with a pilot
        assert read_recipe(words[-1])
        return
    code, page = output_of(*words, *([] if "--dry-run" in words else ["--dry-run"]))
    if name == "cache-teacher":  # its dry run needs the files; the options are valid
        assert (code, "the data file is missing" in page) == (2, True), page
    else:
        assert code == 0, page


def test_every_option_is_read_by_some_source_file() -> None:
    assert not dead_options({key for _, key in OPTIONS} - BY_FLAGS, source_files())


def test_an_option_that_nothing_reads_is_found() -> None:
    sources = {
        Path("distill/options/train.py"): "class C:\n    dead: int\n    read: int\n",
        Path("a.py"): "config.read",
    }
    assert dead_options({"dead", "read"}, sources) == {"dead"}


@pytest.mark.parametrize(("name", "key"), OPTIONS)
def test_wrong_values_are_refused_in_plain_words(name: str, key: str) -> None:
    options, messages = COMMANDS[name].options_class(), []
    for value in ("", "-1", "no such value", -1.5, [], [[]], {"a": {}}, 3.7):
        try:
            options.parse({key: value}, where="a test", flags={key})
        except UserError as error:
            messages.append(str(error))
    assert not re.search(r"[Ii]nput should|pydantic|Config|Options|Value error|cannot have this", "\n".join(messages))


@pytest.mark.parametrize("name", COMMANDS)
def test_options_that_say_so_and_no_others_take_several_values(name: str) -> None:
    """Of an option that is no list, only the last value would count."""
    command: Any = typer.main.get_command(make_app(name.split()))
    for part in name.split():
        command = command.commands[part]
    options = COMMANDS[name].options_class()
    expected = {key for key, field in options.model_fields.items() if "repeatable" in str(field.description)}
    expected |= {"set"} if options.from_files else set()
    assert {item.name for item in command.params if getattr(item, "multiple", False)} == expected


def test_all_servers_of_a_repeated_flag_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    urls = ("http://127.0.0.1:1", "http://127.0.0.1:2")
    given: list[Any] = []
    for name, flag, words in (
        ("cache-teacher", "--server-url", "--teacher t --data d.jsonl --out c --template chat --engine server"),
        ("train", "--teacher-url", "--cache c --student s --out r --student-samples live"),
    ):
        monkeypatch.setattr(Command, "run", lambda _, config: given.append(config) or 0)
        code, text = output_of(name, *words.split(), *(part for url in urls for part in (flag, url)))
        assert code == 0, text
    assert [given[0].server_url, given[1].teacher_url] == [urls, urls]


def test_missing_and_misspelt_options_have_one_line_of_help() -> None:
    assert output_of("trian") == (2, "error: unknown command trian. Did you mean train?\n")
    assert output_of("train", "--bta", "1") == (2, "error: unknown option --bta. Did you mean --beta?\n")
    example = f"Example: {COMMANDS['train'].options_class().example}"
    assert output_of("train")[1].startswith("error: --cache (or --data), --student and --out are required. Example: ")
    assert output_of("train", "--cache", "c", "--out", "o")[1] == f"error: --student is required. {example}\n"
    given = ("train", "--cache", "x", "--student", "y", "--out", "z", "--beta", "-1", "--steps", "many")
    assert (
        output_of(*given)[1] == "error: --beta must be above 0, found -1; --steps must be a whole number, found many\n"
    )


#: options of a file or directory of this machine
LOCAL = [(name, key) for name, key in OPTIONS if "Path" in str(COMMANDS[name].options_class().model_fields[key])]


@pytest.mark.parametrize(("name", "key"), LOCAL)
def test_a_url_is_no_local_path(name: str, key: str) -> None:
    """`Path` would make the directory `s3:` here."""
    options = COMMANDS[name].options_class()
    message = r": must be a local path, found a URL \((s3|file)://\.\.\.\); only teacher caches can be at URLs"
    for value in ("s3://bucket/run", "file:///run", Path("s3://bucket/run")):
        with pytest.raises(UserError, match=message):
            options.parse({key: value}, where="a test", flags={key})
    for value in ("runs/a:b", "./s3:/a"):
        with pytest.raises(ValidationError) as caught:  # other options are missing
            options.model_validate({key: value, "no option": 1})
        assert key not in [error["loc"][0] for error in caught.value.errors()]


def test_every_output_takes_urls_or_refuses_them() -> None:
    assert {name for name, key in LOCAL if key == "out"} == {
        "train", "init-student", "eval", "report", "judge", "add-noise", "prepare-data",
    }  # fmt: skip
    for name, key in {*OPTIONS} - {*LOCAL}:
        if key == "out":
            assert "URL" in str(COMMANDS[name].options_class().model_fields[key].description), name
    words = ("train", "--cache", "s3://bucket/cache", "--student", "s", "--out", "s3://bucket/run")
    code, page = output_of(*words)
    assert (code, page.count("\n")) == (2, 1)
    assert page.startswith(
        "error: --out: must be a local path, found a URL (s3://...); only teacher caches can be at URLs"
    )


def _float_options() -> list[tuple[str, str]]:
    """Options that take a float, alone or in a list or a table."""
    found = []
    for name, key in OPTIONS:
        if "float" in str(COMMANDS[name].options_class().model_fields[key].annotation):
            found.append((name, key))
    assert len(found) > 40
    return found


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e400"])
def test_no_option_is_infinite_or_no_number(value: str) -> None:
    for name, key in _float_options():
        with pytest.raises(ValidationError) as caught:
            COMMANDS[name].options_class().model_validate({key: value})
        assert key in [error["loc"][0] for error in caught.value.errors() if error["loc"]], (name, key)
