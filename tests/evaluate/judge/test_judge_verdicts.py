"""Verdicts on disk: complete lines, one judge per file, nothing discarded silently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpkd.core.errors import UserError
from dpkd.evaluate.judge.verdicts import Answered, Reply, Verdicts

JUDGE = {"url": "http://h/v1", "body": {"model": "m", "seed": 0}, "reask": None}
FIRST = Answered("q1", (Reply("Fine.\nScore: 7\u2028\n", "stop", "m-1", 10, 2),))
SECOND = Answered("q2", (Reply("?", "length", None, None, None), Reply("Score: 3", "stop", "m-1", 20, 2)))
REFUSED = Answered("q3", refused="HTTP 400: too long")


def kept(path: Path, *answered: Answered) -> Verdicts:
    verdicts = Verdicts(path, JUDGE)
    verdicts.read()
    for one in answered:
        verdicts.append(one)
    return verdicts


def test_added_verdicts_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "v.jsonl"
    assert Verdicts(path, JUDGE).read() == {}
    kept(path, FIRST)
    kept(path, SECOND, REFUSED)
    assert list(Verdicts(path, JUDGE).read().values()) == [FIRST, SECOND, REFUSED]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["judge"] == JUDGE
    assert len(lines) == 4


def test_the_first_reply_of_the_right_form_counts() -> None:
    assert FIRST.parsed("score") == ("7",)  # a line separator at the end is white space
    assert SECOND.parsed("score") == ("3",)
    assert REFUSED.parsed("score") is None


def test_a_line_that_was_cut_short_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    kept(path, FIRST, SECOND)
    whole = path.read_bytes()
    ends = [place for place, byte in enumerate(whole, start=1) if byte == ord("\n")]
    sizes = {*range(0, len(whole), 41), *(end + shift for end in ends for shift in (-2, -1, 0))}
    for size in sorted(sizes - {len(whole)}):
        path.write_bytes(whole[:size])
        num_kept = max(0, sum(end <= size for end in ends) - 1)
        assert len(Verdicts(path, JUDGE).read()) == num_kept
        kept(path, *(FIRST, SECOND)[num_kept:])
        assert path.read_bytes() == whole


def test_another_judges_verdicts_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    kept(path, FIRST)
    before = path.read_bytes()
    other = JUDGE | {"body": {"model": "m", "seed": 1}}
    with pytest.raises(
        UserError, match=r"made with other options.*judge\.body\.seed: 0 -> 1 .*nothing was overwritten"
    ):
        Verdicts(path, other).read()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("number", "content", "message"),
    [
        (1, "{}", r"the verdicts were made with other options .*Choose another --out \(or --verdicts\)"),
        (1, "{", r"line 1 of the verdicts cannot be read: JSONDecodeError .*Choose another --out \(or --verdicts\)"),
        (2, "{oops", r"line 2 of the verdicts cannot be read: JSONDecodeError .*Delete the line"),
        (2, "7", r"line 2 of the verdicts cannot be read: TypeError"),
        (2, '{"question": "q", "replies": [{}], "refused": null}', r"line 2 of the verdicts cannot be read: TypeError"),
    ],
)
def test_a_corrupt_line_is_reported(tmp_path: Path, number: int, content: str, message: str) -> None:
    path = tmp_path / "v.jsonl"
    kept(path, FIRST, SECOND)
    lines = path.read_text().splitlines()
    lines[number - 1] = content
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=message):
        Verdicts(path, JUDGE).read()


def test_a_write_error_is_reported(tmp_path: Path) -> None:
    verdicts = kept(tmp_path / "v.jsonl", FIRST)
    (tmp_path / "v.jsonl").unlink()
    (tmp_path / "v.jsonl").mkdir()
    with pytest.raises(UserError, match=r"a verdict cannot be written: .*v\.jsonl"):
        verdicts.append(SECOND)
