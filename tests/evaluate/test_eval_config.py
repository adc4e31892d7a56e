"""Options of an evaluation: text forms, defaults that depend on other options, and the message of every error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpkd.core.errors import UserError
from dpkd.core.settings import read_toml
from dpkd.evaluate.options.eval import EvalConfig


def _parse(**options: Any) -> EvalConfig:
    needed = {"model": "a=models/a", "data": "d=d.jsonl", "out": "out"}
    return EvalConfig.parse(needed | options, where="a test")


@pytest.mark.parametrize(
    "value",
    [["b=runs/b", "a=runs/a=1"], ("b=runs/b", "a=runs/a=1"), {"b": "runs/b", "a": "runs/a=1"}],
)
def test_named_paths_come_as_pairs_or_as_a_table_and_keep_their_order(value: Any) -> None:
    assert list(_parse(model=value).model.items()) == [("b", "runs/b"), ("a", "runs/a=1")]


def test_known_sets_may_come_by_name() -> None:
    assert _parse(data=["dolly", "mine=x.jsonl"]).data == {"dolly": "set:dolly", "mine": "x.jsonl"}
    assert _parse(data="s-ni").data == {"s-ni": "set:s-ni"}


def test_one_named_path_may_come_alone() -> None:
    assert _parse(data="dolly=x.jsonl").data == {"dolly": "x.jsonl"}


@pytest.mark.parametrize(
    ("options", "seeds"),
    [
        ({}, (10, 20, 30, 40, 50)),
        ({"seeds": "none"}, (10, 20, 30, 40, 50)),
        ({"temperature": "0"}, (10,)),
        ({"temperature": 0, "seeds": "7"}, (7,)),
        ({"seeds": "1, 2"}, (1, 2)),
        ({"seeds": [3, 4]}, (3, 4)),
        ({"seeds": 5}, (5,)),
    ],
)
def test_seeds(options: dict[str, Any], seeds: tuple[int, ...]) -> None:
    assert _parse(**options).resolved_seeds() == seeds


def test_buckets_come_as_text() -> None:
    assert _parse(buckets="10,20,40").buckets == (10, 20, 40)
    assert _parse().buckets == (30, 70)
    assert _parse(buckets="median,mean").buckets == ("median", "mean")
    assert _parse(buckets=["median", 90]).buckets == ("median", 90)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "doly"}, r"'doly' is not a known set; did you mean dolly\? Else give NAME=FILE"),
        ({"model": "a="}, r"'a=' is not of the form NAME=PATH"),
        ({"model": ["a=x", "a=y"]}, r"the name 'a' is given twice, for 'x' and 'y'"),
        ({"model": "a/b=x"}, r"the name 'a/b' must start with a letter or digit"),
        ({"model": "..=x"}, r"the name '\.\.' must start with a letter or digit"),
        ({"data": "a|b=x"}, r"`data`: the name 'a\|b' must start"),
        ({"model": "=x"}, r"the name '' must start"),
        ({"data": {}}, r"`data` must have 1 or more values"),
        ({"temperature": 0, "seeds": "1,2"}, r"temperature 0 gives one answer for all 2 seeds"),
        ({"seeds": "1,1"}, r"a seed is given twice in 1,1"),
        ({"seeds": "1,,2"}, r"`seeds` must be a whole number, found ''"),
        ({"seeds": "1,x"}, r"`seeds` must be a whole number, found x"),
        ({"seeds": []}, r"no seed is given"),
        ({"seeds": "-1"}, r"`seeds` must be 0 or more, found -1"),
        ({"buckets": "70,30"}, r"the edges 70,30 do not rise strictly"),
        ({"buckets": "30,30"}, r"do not rise strictly"),
        ({"buckets": "0,30"}, r"`buckets`: '0' is neither a length above 0 nor `median`"),
        ({"buckets": "mode"}, r"`buckets`: 'mode' is neither"),
        ({"predictions": "p/q=x"}, r"the name 'p/q' must start"),
        ({"predictions": "p:/=x"}, r"the name '/' must start"),
        ({"temperature": -1}, r"`temperature` must be 0 or more, found -1"),
        ({"temperature": "nan"}, r"`temperature` must be a finite number, found nan"),
        ({"top_p": 0}, r"`top_p` must be above 0, found 0"),
        ({"device": "tpu"}, r"`device` must be auto, cpu or cuda, found tpu"),
        ({"limit": 0}, r"`limit` must be above 0, found 0"),
        ({"num_sign_flips": 10}, r"`num_sign_flips` must be 100 or more, found 10"),
        ({"cache_rows": 9}, r"--cache-rows goes with --cache: nothing else reads it"),
        ({"cache_rows": 0}, r"--cache-rows goes with --cache"),
        ({"tempreature": 1}, r"unknown option `tempreature` .did you mean `temperature`.. .in "),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _parse(**options)


def test_toml_gives_the_same_options_back(tmp_path: Any) -> None:
    config = _parse(model=["b=x", "a=y"], limit=5, seeds="1,2", temperature=0.7, buckets="median,90")
    path = tmp_path / "dpkd.toml"
    path.write_text(config.to_toml())
    assert EvalConfig.parse(read_toml(path), where=str(path)) == config


def test_the_options_import_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'pyarrow', 'matplotlib', 'datasets', 'rouge_score'}"
    code = f"import sys, dpkd.evaluate.options.eval; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_model_without_a_name_has_that_of_its_directory() -> None:
    config = EvalConfig.parse({"model": ["runs/trained", "t=x/y", "."], "data": "dolly", "out": "o"}, where="a test")
    assert config.model == {"trained": "runs/trained", "t": "x/y", Path.cwd().name: "."}
    with pytest.raises(UserError, match="the name 'trained' is given twice"):
        EvalConfig.parse({"model": ["a/trained", "b/trained"], "data": "dolly", "out": "o"}, where="a test")
