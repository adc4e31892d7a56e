"""The command line: the time that help takes, and errors."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from support.commands import Command, Result, dpkd

from dpkd.pipelines.commands.registry import COMMANDS


def new_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command as a shell starts it."""
    command = [sys.executable, "-m", "dpkd.pipelines.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def assert_one_clear_line(result: Result | subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    for part in parts:
        assert part in last, last


def test_help_names_every_command_and_is_quick() -> None:
    times = []
    for _ in range(5):
        started_s = time.perf_counter()
        result = new_process("--help")
        times.append(time.perf_counter() - started_s)
    for command in COMMANDS.values():
        assert re.search(rf"^  {command.name} ", result.stdout, flags=re.M), command.name
    assert "Exit codes: 0 success; 1 internal error (traceback path printed); 2 invalid" in result.stdout
    assert min(times) < 0.5


def test_the_version_is_that_of_the_package() -> None:
    result = new_process("--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"dpkd {version('dpkd')}\n", "")


def test_help_and_configs_import_no_heavy_library() -> None:
    code = (
        "import contextlib, io, sys\n"
        "from dpkd.pipelines.cli import COMMANDS, run\n"
        "heavy = {'torch', 'transformers', 'vllm', 'pyarrow', 'datasets', 'numpy', 'accelerate', 'rich'}\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    run(['--help'])\n"
        "print(sorted((heavy | {'pydantic'}) & set(sys.modules)))\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    for name in COMMANDS:\n"
        "        run([*name.split(), '--help'])\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["[]", "[]"]


def test_data_order_and_metrics_import_no_torch() -> None:
    code = (
        "import sys, dpkd.teacher_cache.store.order, dpkd.teacher_cache.store.schema\n"
        "import dpkd.evaluate.metrics.scores\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, toy_teacher: Path, toy_student: Path, other_student: Path, toy_cache: Path, toy_data: Path,
    write_rows: Callable[..., Path],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    cache = ("cache-teacher", "--teacher", toy_teacher, "--out", out, "--engine", "transformers", "--max-new-tokens", 4)
    assert_one_clear_line(dpkd(*cache, "--data", tmp_path / "none.jsonl"), "the data file is missing", "none.jsonl")
    bad_line = tmp_path / "bad.jsonl"
    bad_line.write_text('{"instruction": "a"}\n{oops\n')
    assert_one_clear_line(dpkd(*cache, "--data", bad_line), "line 2 is not JSON", "bad.jsonl")
    no_instruction = write_rows([{"question": "why"}], "other.jsonl")
    assert_one_clear_line(dpkd(*cache, "--data", no_instruction), "line 1 is without `instruction`")
    assert_one_clear_line(dpkd(*cache, "--data", toy_data, "--top-k", 601), "found 601, expected at most 600")
    assert_one_clear_line(
        dpkd("cache-teacher", "--teacher", tmp_path / "t", "--data", toy_data, "--out", out), "the teacher is not found"
    )
    train = ("train", "--cache", toy_cache, "--out", out, "--steps", 1, "--batch-size", 2)
    assert_one_clear_line(dpkd(*train, "--student", other_student), "the student's tokenizer is not the cache's")
    assert_one_clear_line(
        dpkd(*train, "--student", toy_student, "--level", "sequence", "--round", "no"), "no such round", "'r0'"
    )
    assert not out.exists()


def test_bad_options_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    recipe = tmp_path / "train.toml"
    recipe.write_text('student = "s"\ncache = "c"\nout = "o"\nbatch_sise = 3\n')
    assert_one_clear_line(
        dpkd("train", "--config", recipe), "unknown option `batch_sise` (did you mean `batch_size`?)", "train.toml"
    )
    recipe.write_text("steps = = 3")
    assert_one_clear_line(dpkd("train", "--config", recipe), "the config file is not TOML")
    assert_one_clear_line(new_process("train", "--config", tmp_path / "none.toml"), "the config file is missing")
    assert_one_clear_line(dpkd("train", "--bogus", 1), "unknown option --bogus. See dpkd train --help")
    assert_one_clear_line(dpkd("train", "--set", "beta"), "--set takes KEY=VALUE")
    assert_one_clear_line(
        dpkd("train", "--student", "s", "--out", "o"),
        "--cache (or --data) is required. Example: dpkd train --cache cache --student",
    )
    assert_one_clear_line(dpkd("train", "--cache", "c", "--out", "o"), "--student is required")
    assert_one_clear_line(
        dpkd("train", "--cache", "c", "--student", "s", "--out", "o", "--level", "word"),
        "--level must be token or sequence, found word",
    )
    assert_one_clear_line(
        dpkd("train", "--cache", "c", "--student", "s", "--out", "o", "--beta", "1", "--set", "beta=2"),
        "beta is given twice, as a flag and by --set",
    )
    assert_one_clear_line(dpkd("cache", "info", tmp_path / "none"), "the cache directory is missing")
    assert_one_clear_line(dpkd("cache", "verify", tmp_path), "the directory is not a cache")


def test_flags_toml_and_set_meet_in_one_config(tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    file.write_text('student = "from-file"\ncache = "c"\nout = "o"\nbeta = 0.7\nsave_every = 9\n')
    result = dpkd(
        "train",
        "--config",
        file,
        "--student",
        "from-flag",
        "--set",
        "sft_weight=0.5",
        "--set",
        "save_every=none",
        "--dry-run",
    )
    assert result.returncode == 0, result.stderr
    assert 'student = "from-flag"' in result.stdout
    assert "beta = 0.7" in result.stdout
    assert "sft_weight = 0.5" in result.stdout
    assert 'save_every = "none"' in result.stdout  # off, and off again when this is read: left out, it would be 100
    assert not (tmp_path / "o").exists()


def test_no_command_shows_the_help() -> None:
    result = new_process()
    assert result.returncode == 2
    assert "cache-teacher" in result.stdout + result.stderr
    assert len(result.stderr.splitlines() + result.stdout.splitlines()) > 5


def test_an_internal_error_is_exit_code_1_with_the_traceback_in_a_file() -> None:
    from dpkd.pipelines.process import run_process

    def fail() -> int:
        raise RuntimeError("a bug")

    import contextlib
    import io

    captured = io.StringIO()
    with contextlib.redirect_stderr(captured):
        status = run_process(fail, "dpkd fail")
    assert status == 1
    line = captured.getvalue().strip()
    assert line.startswith("internal error: RuntimeError: a bug. The traceback is in ")
    log = Path(line.rsplit(" ", 1)[1])
    assert log.read_text().startswith("command: dpkd fail\n\nTraceback")
    log.unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cache-teacher", "--teacher", "t", "--data", "d", "--out", "memory://a"), "a folder in memory is gone"),
        (("train", "--cache", "memory://a", "--student", "s", "--out", "o"), "a folder in memory is gone"),
        (("cache", "info", "memory://a"), "a folder in memory is gone"),
        (("cache", "info", "nothing://a"), "the URL cannot be used: Protocol not known: nothing"),
        (("cache", "info", "github://a"), "the URL cannot be used: GithubFileSystem"),
    ],
)
def test_folders_that_no_command_can_use_are_refused(arguments: tuple[str, ...], message: str) -> None:
    assert_one_clear_line(dpkd(*arguments), message)


def test_a_link_to_its_own_directory_is_refused(tmp_path: Path, toy_teacher: Path, toy_data: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "out")
    options = {"engine": "transformers", "teacher": toy_teacher, "data": toy_data, "out": tmp_path / "out"}
    result = dpkd("cache-teacher", *(word for name, value in options.items() for word in (f"--{name}", value)))
    assert_one_clear_line(result, "the directory cannot be read: Too many levels of symbolic links")


def _in_new_process(redirection: str, *lines: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of dpkd whose work is `lines`, with the shell's `redirection`."""
    work = "".join(f"    {line}\n" for line in lines)
    script = (
        "import os, sys\nfrom dpkd.core.progress import Progress, say\nfrom dpkd.pipelines.process import run_process\n"
        f"def work():\n{work}    return 0\nsys.exit(run_process(work, 'a test'))"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)} {redirection}"
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, env=os.environ | environment
    )


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2>&- >&- <&-", "2> >(exit 0)"])
def test_work_goes_on_without_a_standard_error(tmp_path: Path, redirection: str) -> None:
    """And no file gets the number of a closed stream: a library's message would be written into it."""
    out = tmp_path / "shard"
    lines = [
        f"with open({str(out)!r}, 'w') as file:",
        "    assert file.fileno() > 2",
        "    for number in range(3): say('a message')",
        "    with Progress('rows', 1, 'rows') as progress: progress.advance()",
        "    os.system('echo a message of a library >&2')",
        "    print('more', file=sys.stderr, flush=True)",
        "    file.write('whole')",
    ]
    result = _in_new_process(redirection, *lines)
    assert result.returncode == 0, result
    assert out.read_text() == "whole"
    assert result.stdout == ""


def test_a_standard_output_without_unicode_gets_escapes() -> None:
    for encoding in ("ascii", "latin-1"):
        result = _in_new_process("", "print('\u2603')", "say('\u2603')", PYTHONIOENCODING=encoding)
        assert result.returncode == 0, result
        assert "\\u2603" in result.stdout
        assert "\\u2603" in result.stderr


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ("open('/' + 'x' * 999)", "File name too long (in /xxx"),
        ("open('/')", "Is a directory (in /)"),
        ("os.close(99)", "Bad file descriptor"),
        ("raise OSError('odd')", "odd"),
        ("raise PermissionError(13, 'Permission denied', '/a')", "Permission denied (in /a)"),
        ("print('x' * 99999)", "No space left on device"),
    ],
)
def test_errors_of_the_system_are_one_line(work: str, message: str) -> None:
    result = _in_new_process(">/dev/full", work)
    assert result.returncode == 2, result
    [line] = result.stderr.splitlines()
    assert line.startswith(f"error: the system refused a read or write: {message}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_checkpoints_and_exits_130(
    tmp_path: Path, toy_cache: Path, toy_student: Path, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    process = Command(
        "train", "--cache", toy_cache, "--student", toy_student, "--out", out, "--batch-size", 4, "--device", "cpu",
        "--steps", 100_000,
    )  # fmt: skip
    deadline_s = time.monotonic() + 120
    while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    process.send_signal(number)
    done = process.finish(60)
    assert done.returncode == 130, done.stderr
    assert "run the same command again to resume" in done.stderr
    assert "Traceback" not in done.stderr
    checkpoints = sorted(out.glob("checkpoint-*"))
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert str(len(lines)) in {path.name.removeprefix("checkpoint-") for path in checkpoints}


def test_info_as_json_has_the_main_facts(toy_cache: Path) -> None:
    import json

    facts = json.loads(dpkd("cache", "info", toy_cache, "--json").stdout)
    assert facts["rows"] == 40
    for key in ("positions", "entries", "bytes"):
        assert facts[key] > 0
    assert 0 < facts["mass_kept"] <= 1
    assert facts["identities"]["template"]["name"] == "chat"
    assert facts["rounds"]["r0"]["rows"] == 40
    assert "rows: 40" in dpkd("cache", "info", toy_cache).stdout
    assert "sound: 80 rows" in dpkd("cache", "verify", toy_cache).stdout
