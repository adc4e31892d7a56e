"""Answers on disk: the round trip, and every reason not to reuse a file."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpkd.core.files import replacing, write_text
from dpkd.evaluate.answers.answers import Answer, answers_path, partial_answers, read_answers, write_answers
from dpkd.evaluate.answers.generation import request_seed

_ANSWERS = [Answer("x", "text \u00e9\n", [1, 2, 50256], "stop"), Answer("y", "", [], "length")]
_IDS = ["x", "y"]


def test_round_trip(tmp_path: Path) -> None:
    path = answers_path(tmp_path, "model", "data", 10)
    assert path.relative_to(tmp_path).as_posix() == "model/data/seed-10.parquet"
    assert read_answers(path, "f1", _IDS) is None
    write_answers(path, _ANSWERS, "f1")
    assert read_answers(path, "f1", _IDS) == _ANSWERS
    assert [answer.num_tokens for answer in _ANSWERS] == [3, 0]
    assert [file.name for file in path.parent.iterdir()] == ["seed-10.parquet"]


def test_another_fingerprint_is_reported_and_not_reused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_answers(tmp_path / "a.parquet", _ANSWERS, "f1")
    assert read_answers(tmp_path / "a.parquet", "f2", _IDS) is None
    assert "another model, data or settings (fingerprint f1, now f2)" in capsys.readouterr().err


def test_other_rows_are_reported_and_not_reused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_answers(tmp_path / "a.parquet", _ANSWERS, "f1")
    assert read_answers(tmp_path / "a.parquet", "f1", ["y", "x"]) is None
    assert "does not have the 2 expected rows" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_a_corrupt_file_is_reported_and_not_reused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: int
) -> None:
    path = tmp_path / "a.parquet"
    write_answers(path, _ANSWERS, "f1")
    path.write_bytes(path.read_bytes()[:kept])
    assert read_answers(path, "f1", _IDS) is None
    assert "cannot be read" in capsys.readouterr().err


def test_a_flipped_bit_never_changes_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    text = "an answer that is long enough to be found again "
    answers = [Answer("x", text, [1], "stop"), Answer("y", text[::-1], [1], "stop")]
    write_answers(path, answers, "f1")
    whole = path.read_bytes()
    refused = []
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        read = read_answers(path, "f1", _IDS)
        assert read in (None, answers), f"byte {place}"
        refused += [place] if read is None else []
    # the rest are statistics and metadata that nothing here depends on
    assert len(refused) > len(whole) // 5 / 4


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail_half_way() -> None:
        with replacing(path) as temporary:
            temporary.write_text("new, but")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@given(seed=st.integers(0, 2**40), example_id=st.text(max_size=20))
def test_request_seeds_fit_engines_and_differ_by_seed(seed: int, example_id: str) -> None:
    assert 0 <= request_seed(seed, example_id) < 2**31
    assert request_seed(seed, example_id) == request_seed(seed, example_id)
    assert request_seed(seed, example_id) != request_seed(seed + 1, example_id)


def test_request_seed_is_the_documented_function() -> None:
    # the low 31 bits of the first 8 bytes are those of bytes 4 to 7
    digest = hashlib.sha256(b"10\x00row-1").hexdigest()
    assert request_seed(10, "row-1") == int(digest[8:16], 16) & 0x7FFFFFFF


def test_request_seeds_do_not_collide_where_seed_and_id_touch() -> None:
    assert request_seed(1, "11") != request_seed(11, "1")


def _parse(value: dict[str, Any]) -> Answer:
    return Answer(**value)


def test_partial_answers_are_read_back_until_they_are_deleted(tmp_path: Path) -> None:
    path = tmp_path / "m" / "seed-10.parquet"
    partial = partial_answers(path, "f1")
    assert partial.read(_parse) == []
    for answer in _ANSWERS:
        partial.append(asdict(answer))
    assert partial_answers(path, "f1").read(_parse) == _ANSWERS
    partial.delete()
    assert list(path.parent.iterdir()) == []


def test_a_line_cut_short_anywhere_is_dropped_and_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "seed-10.parquet"
    partial = partial_answers(path, "f1")
    partial.read(_parse)
    for answer in _ANSWERS:
        partial.append(asdict(answer))
    complete = partial.path.read_bytes()
    for num_bytes in range(len(complete)):
        partial.path.write_bytes(complete[:num_bytes])
        again = partial_answers(path, "f1")
        kept = again.read(_parse)
        assert kept == _ANSWERS[: len(kept)]
        for answer in _ANSWERS[len(kept) :]:
            again.append(asdict(answer))
        assert partial.path.read_bytes() == complete, num_bytes


def test_partial_answers_of_another_fingerprint_are_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "seed-10.parquet"
    for fingerprint in ("f1", "f2"):
        partial = partial_answers(path, fingerprint)
        assert partial.read(_parse) == []
        partial.append(asdict(_ANSWERS[0]))
    assert partial_answers(path, "f1").read(_parse) == []
    assert partial_answers(path, "f2").read(_parse) == _ANSWERS[:1]
