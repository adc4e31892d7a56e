"""Conversations that cannot be used: exit code 2, one line that says what to do, and nothing written or lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.commands import Result, dpkd
from support.conversations import CALL, conversations, make_models, say, write

QUESTION = say("user", "Weather in Rome?")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_models(tmp_path_factory.mktemp("errors"))


def cache(out: Path, teacher: Path, data: Path, *options: str) -> Result:
    common = ["--engine", "transformers", "--device", "cpu", "--template", "chat", "--max-new-tokens", "4"]
    return dpkd("cache-teacher", "--teacher", teacher, "--data", data, "--out", out, *common, *options)


def check_refused(result: Result, message: str) -> None:
    assert result.returncode == 2, result.stderr
    [line] = result.stderr.strip().splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"messages": [say("narrator", "Once"), QUESTION]}, (), "turn 1 of `messages` has an unknown role"),
        ({"messages": [QUESTION, say("assistant", "", tool_calls=[CALL]), QUESTION]}, (), "has no result"),
        ({"messages": [QUESTION, say("tool", "22"), QUESTION]}, (), "is the result of no tool call"),
        (
            {"messages": [QUESTION], "teacher_messages": [say("oracle", "x")]},
            (),
            "of `teacher_messages` has an unk",
        ),
        ({"turns": ["Why?"]}, ("--template", "alpaca", "--template-arg", "a=1"), "only a chat template has arguments"),
        ({"turns": ["Why?"]}, ("--template-arg", "enable_thinking"), "is not of the form KEY=VALUE"),
    ],
)
def test_one_line_and_exit_code_2(
    tmp_path: Path,
    models: tuple[Path, Path],
    row: dict[str, Any],
    options: tuple[str, ...],
    message: str,
) -> None:
    data = write(tmp_path / "data.jsonl", [conversations()[0], row])
    check_refused(cache(tmp_path / "cache", models[0], data, *options), message)
    assert not (tmp_path / "cache").exists()


def test_a_template_that_refuses_a_turn(tmp_path: Path, models: tuple[Path, Path]) -> None:
    import shutil

    strict = Path(shutil.copytree(models[0], tmp_path / "strict"))
    template = strict / "chat_template.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    data = write(tmp_path / "data.jsonl", [conversations()[0], {"messages": [say("system", "Be kind."), QUESTION]}])
    message = "the chat template refuses line 2: System role not supported: found roles system, user"
    check_refused(cache(tmp_path / "cache", strict, data), message)
    assert not (tmp_path / "cache").exists()


def test_shards_of_a_job_survive_an_error_of_the_data(tmp_path: Path, models: tuple[Path, Path]) -> None:
    """A finished cache is as it was after the same command with data that has become bad."""
    data = write(tmp_path / "data.jsonl", conversations())
    assert cache(tmp_path / "cache", models[0], data, "--turns", "all").returncode == 0
    before = {path: path.read_bytes() for path in sorted((tmp_path / "cache").rglob("*")) if path.is_file()}
    write(data, [{"messages": [say("narrator", "Once"), QUESTION]}])
    assert cache(tmp_path / "cache", models[0], data, "--turns", "all").returncode == 2
    assert {path: path.read_bytes() for path in before} == before
    assert dpkd("cache", "verify", tmp_path / "cache").returncode == 0


def test_overlapping_spans_are_found_by_verify(tmp_path: Path, models: tuple[Path, Path]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dpkd.teacher_cache.store.folder import MANIFEST
    from dpkd.teacher_cache.store.folders import open_folder
    from dpkd.teacher_cache.store.reader import TeacherCache
    from dpkd.teacher_cache.store.shards import encode_shard

    data = write(tmp_path / "data.jsonl", conversations()[1:2])
    assert cache(tmp_path / "cache", models[0], data, "--turns", "all", "--responses", "reference").returncode == 0
    # as if another program had written the cache: every checksum is right
    opened = TeacherCache.open(tmp_path / "cache")
    [record] = opened.shards()
    table = pq.read_table(tmp_path / "cache" / record.path)
    starts, lengths = table["span_starts"].to_pylist(), table["span_lengths"].to_pylist()
    starts[0][1] = starts[0][0] + lengths[0][0] - 1
    column = pa.array(starts, table.schema.field("span_starts").type)
    table = table.set_column(table.schema.get_field_index("span_starts"), table.schema.field("span_starts"), column)
    content, changed = encode_shard(table, record.path, record.origin)
    folder = open_folder(tmp_path / "cache")
    folder.write(record.path, content)
    opened.manifest.shards[:] = [changed]
    folder.write(MANIFEST, opened.manifest.to_bytes())
    result = dpkd("cache", "verify", tmp_path / "cache")
    assert result.returncode == 2
    assert "row 0 (two): the spans overlap or lie outside the row" in result.stderr.splitlines()[-1]
