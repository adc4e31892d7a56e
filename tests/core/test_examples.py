"""Rows as examples: every accepted form, and every error with its line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpkd.core.errors import UserError
from dpkd.core.prompts.examples import Example, SkippedRow
from dpkd.core.prompts.sources import iter_examples, open_examples, raw_rows

Write = Callable[..., Path]


def read(path: Path, limit: int | None = None) -> list[Example | SkippedRow]:
    return list(iter_examples(open_examples(str(path)), limit))


def test_the_three_row_forms(write_rows: Write) -> None:
    instruction, chat, prompt = read(
        write_rows(
            [
                {"instruction": "Add.", "input": " 1 2 ", "output": ["3", "three"], "id": "a", "category": "sums"},
                {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
                {"prompt": "Once upon"},
            ]
        )
    )
    assert instruction == Example("a", 1, ("3", "three"), instruction="Add.", input="1 2", category="sums")
    assert isinstance(chat, Example)
    assert chat.messages is not None
    assert [turn.content for turn in chat.messages] == ["Hi"]
    assert chat.references == ("Hello",)
    assert isinstance(prompt, Example)
    assert (prompt.prompt, prompt.references, prompt.example_id) == ("Once upon", (), "line-00000003")


def test_json_and_parquet_hold_the_same_rows(tmp_path: Path, write_rows: Write) -> None:
    rows = [{"instruction": "A", "input": "", "output": "x"}, {"instruction": "B", "input": "i", "output": "y"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    expected = read(write_rows(rows))
    assert read(tmp_path / "rows.json") == expected
    assert read(tmp_path / "rows.parquet") == expected


def test_unusable_values_are_skipped_by_line(write_rows: Write) -> None:
    items = read(
        write_rows(
            [
                {"instruction": "  ", "output": "x"},
                {"instruction": 5, "output": "x"},
                {"instruction": "ok", "output": {"no": 1}},
                {"messages": [{"role": "assistant", "content": "alone"}]},
                {"messages": "hello"},
                {"instruction": "ok", "id": "same"},
                {"instruction": "ok", "id": "same"},
                {"instruction": "half \ud800"},
            ]
        )
    )
    skipped = {item.line: item.reason for item in items if isinstance(item, SkippedRow)}
    assert sorted(skipped) == [1, 2, 3, 4, 5, 7, 8]
    assert "half a surrogate pair" in skipped[8]
    assert "is empty" in skipped[1]
    assert "is int, not text" in skipped[2]
    assert "`output`" in skipped[3]
    assert "no user turn" in skipped[4]
    assert "not a list" in skipped[5]
    assert "'same' is also on an earlier line" in skipped[7]


def test_limit_counts_rows_of_the_file(write_rows: Write) -> None:
    assert len(read(write_rows([{"instruction": str(i)} for i in range(9)]), limit=4)) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"instruction": "a"}\n{"instruction": \n', "line 2 is not JSON"),
        ('{"instruction": "a"}\n{"question": "b"}\n', "line 2 is without `instruction`: found keys question"),
        ('{"instruction": "a"}\n[1]\n', "line 2 holds no object: found list, expected object"),
        ("", "the data holds no row"),
        ("\n\n", "the data holds no row"),
    ],
)
def test_a_file_that_is_no_data_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read(path)


def test_bytes_that_are_not_text_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"instruction": "\xff"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        read(path)


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_a_file_of_another_kind_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text("hello")
    with pytest.raises(UserError, match=r"not JSON|not Parquet"):
        read(path)


def test_a_missing_file_names_itself(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the data file is missing .*nowhere\.jsonl"):
        open_examples(str(tmp_path / "nowhere.jsonl"))


def test_an_unknown_suffix_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=r"suffix that is not known: found '\.csv'"):
        open_examples(str(tmp_path / "rows.csv"))


def test_the_datasets_library_loads_a_name_or_a_directory(tmp_path: Path, write_rows: Write) -> None:
    rows = [{"instruction": "A", "input": "", "output": "x"}, {"instruction": "B", "input": "i", "output": "y"}]
    directory = tmp_path / "set"
    directory.mkdir()
    write_rows(rows).rename(directory / "train.jsonl")
    source = open_examples(str(directory))
    found = list(iter_examples(source))
    assert [(item.instruction, item.references) for item in found if isinstance(item, Example)] == [
        ("A", ("x",)),
        ("B", ("y",)),
    ]
    assert open_examples(f"{directory}:train").identity["sha256"] == source.identity["sha256"]


def test_a_name_that_nobody_knows_is_an_error() -> None:
    with pytest.raises(UserError, match="neither a file nor a dataset that the `datasets` library can load"):
        open_examples("nobody/has-such-data")


def test_halves_of_surrogate_pairs_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    half = json.dumps("\ud800")
    other = [f'{{"instruction": "a", "{key}": {half}}}' for key in ("id", "category", "input")]
    rows = [f'{{"instruction": {half}}}', *other, '{"instruction": "a"}']
    path.write_text("\n".join(rows) + "\n")
    *skipped, sound = read(path)
    assert [type(item) for item in skipped] == [SkippedRow] * 4
    assert isinstance(sound, Example)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    ("value", "message"),
    [("9" * 5000, "has a number with too many digits"), ("[" * 100_000 + "]" * 100_000, "is nested too deeply")],
)
def test_json_that_python_cannot_hold_is_one_line(tmp_path: Path, suffix: str, value: str, message: str) -> None:
    path = tmp_path / f"rows{suffix}"
    row = f'{{"instruction": "a", "x": {value}}}'
    path.write_text(f"[{row}]" if suffix == ".json" else row + "\n")
    with pytest.raises(UserError, match=message):
        read(path)


def test_a_row_that_is_nested_deeply_is_skipped(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(sys.setrecursionlimit, sys.getrecursionlimit()))
    sys.setrecursionlimit(1000)  # Python's own; a library may have raised it
    path = tmp_path / "rows.jsonl"
    deep = "[" * 900 + "]" * 900
    row = f'{{"messages": [{{"role": "user", "content": "a"}}], "tools": [{{"x": {deep}}}]}}'
    path.write_text(row + '\n{"prompt": "b"}\n')
    first, second = read(path)
    assert first == SkippedRow(1, "a value is nested too deeply")
    assert isinstance(second, Example)


def test_parquet_columns_that_rows_do_not_have_are_not_read(tmp_path: Path) -> None:
    far_future = pa.array([2**52, 0], pa.timestamp("s"))  # beyond Python's dates
    columns = {"instruction": ["a", "b"], "when": far_future, "raw": [b"\xff", b""]}
    pq.write_table(pa.table(columns), tmp_path / "odd.parquet")
    assert [item.instruction for item in read(tmp_path / "odd.parquet") if isinstance(item, Example)] == ["a", "b"]
    with pytest.raises(UserError, match="is not Parquet, or is corrupt"):
        list(raw_rows(open_examples(str(tmp_path / "odd.parquet")), ["when"]))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "none.parquet")
    with pytest.raises(UserError, match="line 1 is without `instruction`: found keys text"):
        read(tmp_path / "none.parquet")


def test_parquet_text_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    offsets = pa.py_buffer(np.array([0, 2], np.int32).tobytes())
    text = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"a\xff")])
    pq.write_table(pa.table({"instruction": text}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="a text of the file is not UTF-8"):
        read(tmp_path / "rows.parquet")
