"""Files of core: atomic writes, repaired torn lines, and output directories with one owner."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from dpkd.core.errors import UserError
from dpkd.core.files import replacing_directory
from dpkd.core.identity import derive_seed
from dpkd.core.json_lines import AppendOnlyLines, complete_lines, read_json_lines
from dpkd.core.markdown import markdown_table
from dpkd.core.outputs import output_exists

HEADER = {"fingerprint": "abc"}


def test_a_directory_is_replaced_only_when_the_block_ends_well(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "student"
    with replacing_directory(target) as new:
        (new / "a").write_text("1")
    with pytest.raises(UserError, match="cannot be written"), replacing_directory(target) as new:
        (new / "a" / "of a file that does not exist").write_text("2")
    assert (target / "a").read_text() == "1"
    with replacing_directory(target) as new:
        (new / "b").write_text("3")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in target.parent.iterdir()] == ["student"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # of tokenizers
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'")]),
    ],
)
def test_a_full_disk_is_one_line_whichever_library_meets_it(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(
            UserError, match=r"^the directory cannot be written: No space left on device \(in .*student\)\. F"
        ),
        replacing_directory(tmp_path / "student"),
    ):
        raise error
    assert not any(tmp_path.iterdir())


def test_other_errors_while_a_directory_is_written_stay_what_they_are(tmp_path: Path) -> None:
    for error in (ValueError("a shape"), SafetensorError("a shape"), UserError("(os error 28)")):
        with pytest.raises(type(error)) as raised, replacing_directory(tmp_path / "student"):
            raise error
        assert raised.value is error


def test_leftovers_of_a_killed_process_do_not_enter_the_next_directory(tmp_path: Path) -> None:
    (tmp_path / ".student.tmp").mkdir()
    (tmp_path / ".student.tmp" / "old").write_text("")
    with replacing_directory(tmp_path / "student") as new:
        (new / "a").write_text("")
    assert [path.name for path in (tmp_path / "student").iterdir()] == ["a"]


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_log_cut_anywhere_reads_its_complete_lines_and_grows_on(tmp_path: Path, cut: int) -> None:
    log = AppendOnlyLines(tmp_path / "log.jsonl", HEADER)
    log.append({"n": 1})
    log.append({"n": 2}, {"n": 3})
    log.path.write_bytes(log.path.read_bytes()[:-cut])
    kept = [json.loads(line)["n"] for line in complete_lines(log.path)[1:]]
    again = AppendOnlyLines(log.path, HEADER)
    assert again.read(lambda value: value["n"]) == kept
    again.append({"n": 9})
    assert AppendOnlyLines(log.path, HEADER).read(lambda value: value["n"]) == [*kept, 9]


def test_a_log_of_another_header_starts_over_or_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    AppendOnlyLines(path, HEADER).append({"n": 1})
    other = AppendOnlyLines(path, {"fingerprint": "xyz"})
    with pytest.raises(UserError, match=r"verdicts were made with other options.*abc.*xyz") as error:
        other.read(dict, strict=("verdicts", "Give another --out"))
    assert "Give another --out" in str(error.value)
    assert other.read(dict) == []
    other.append({"n": 2}, durable=True)
    assert path.read_text() == '{"fingerprint": "xyz"}\n{"n": 2}\n'


def test_a_line_that_the_parser_refuses_ends_a_log_or_is_an_error_with_its_number(tmp_path: Path) -> None:
    log = AppendOnlyLines(tmp_path / "log.jsonl", HEADER)
    log.append({"n": 1}, {"m": 2}, {"n": 3})
    assert log.read(lambda value: value["n"]) == [1]
    with pytest.raises(UserError, match="line 3 of the verdicts cannot be read: KeyError"):
        log.read(lambda value: value["n"], strict=("verdicts", "x"))


def test_json_lines_have_the_numbers_of_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"a": "\u2028"}\r\n\n[2]\n{"b"'.encode())
    rows = read_json_lines(path)
    assert [next(rows), next(rows)] == [(1, {"a": "\u2028"}), (3, [2])]
    with pytest.raises(UserError, match=r"line 4 is not JSON: .* at column 5"):
        next(rows)
    path.write_bytes(b'{}\n"\xff"\n')
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        list(read_json_lines(path))
    with pytest.raises(UserError, match="missing"):
        list(read_json_lines(tmp_path / "none.jsonl"))


def _exists(out: Path, made_of: dict[str, Any], **more: Any) -> bool:
    return output_exists(out, "made_of.json", made_of, "student", **more)


def test_an_output_with_other_options_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not _exists(out, {"seed": 1})
    out.mkdir()
    assert not _exists(out, {"seed": 1})
    (out / "made_of.json").write_text('{"seed": 1, "path": "a", "range": [1, 2]}')
    assert _exists(out, {"seed": 1, "path": "a", "range": (1, 2)})
    assert _exists(out, {"seed": 1, "path": "b", "range": (1, 2)}, ignore=frozenset({"path"}))
    with pytest.raises(UserError, match=r"holds another student; differing: seed: 1 -> 2"):
        _exists(out, {"seed": 2, "path": "a", "range": [1, 2]})
    (out / "made_of.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        _exists(out, {"seed": 1})


def test_a_record_of_an_earlier_version_is_upgraded_before_it_is_compared(tmp_path: Path) -> None:
    (tmp_path / "made_of.json").write_text('{"seed": 1}')
    with pytest.raises(UserError, match=r"differing: depth: null -> 2"):
        _exists(tmp_path, {"seed": 1, "depth": 2})
    assert _exists(tmp_path, {"seed": 1, "depth": 2}, upgraded=lambda record: {"depth": 2} | record)
    (tmp_path / "made_of.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be read"):
        _exists(tmp_path, {"seed": 1}, upgraded=lambda record: {"depth": 2} | record)


def test_what_a_kill_leaves_of_a_write_makes_no_directory_foreign(tmp_path: Path) -> None:
    (tmp_path / ".made_of.4711.tmp.json").write_text('{"se')
    assert not _exists(tmp_path, {"seed": 1})
    (tmp_path / ".hidden").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no student"):
        _exists(tmp_path, {"seed": 1})


def test_foreign_files_are_never_taken_over(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no student"):
        _exists(tmp_path, {})
    assert not _exists(tmp_path, {}, result="report.json")
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UserError, match="not empty"):
        _exists(tmp_path, {}, result="report.json")
    with pytest.raises(UserError, match="is a file"):
        _exists(tmp_path / "notes.txt", {})


def test_a_seed_is_the_leading_bits_of_a_sha256() -> None:
    digest = hashlib.sha256(b"7\x00line-1\x000").hexdigest()
    assert derive_seed(7, "line-1", 0, bits=64) == int(digest[:16], 16)
    assert derive_seed(7, "line-1", 0, bits=31) == int(digest[:8], 16) // 2


def test_a_table_keeps_bars_and_line_breaks_inside_their_cells() -> None:
    table = markdown_table(["model", "Rouge-L"], [["a|b", 1.5], ["c\nd", None]])
    assert table == "| model | Rouge-L |\n| :--- | ---: |\n| a\\|b | 1.5 |\n| c d |  |\n"
