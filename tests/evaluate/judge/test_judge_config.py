"""Options of the judge: errors before anything is read or asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from dpkd.core.errors import UserError
from dpkd.evaluate.options.judge import JudgeConfig
from dpkd.evaluate.report.provenance import command_text
from dpkd.pipelines.flags import resolve

PLAIN = {"report": "r", "out": "o", "judge_url": "http://127.0.0.1:8000/v1", "judge_model": "judge"}


def parse(**options: Any) -> JudgeConfig:
    given = {key: value for key, value in (PLAIN | options).items() if value is not None}
    return JudgeConfig.parse(given, where="a test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"report": None}, r"`report` .or `predictions`. is required"),
        ({"predictions": "a=a.jsonl"}, r"give --report or --predictions, not both"),
        ({"buckets": "10,50"}, r"give --report or --buckets, not both"),
        ({"report": None, "predictions": "a=a.jsonl"}, r"--data is required"),
        ({"report": None, "predictions": "a b=a", "data": "d=d"}, r"the name 'a b' must start with"),
        ({"report": None, "predictions": "a=a", "data": "d=d", "buckets": "x"}, r"'x' is neither a length"),
        ({"report": None, "predictions": "a", "data": "d=d"}, r"'a' is not of the form NAME=PATH"),
        ({"grade_reference": True, "mode": "pairwise"}, r"--grade-reference needs --mode pointwise"),
        ({"judge_url": "127.0.0.1:8000"}, r"is not an address of the form https://HOST/v1"),
        ({"judge_url": "ftp://host/v1"}, r"is not an address of the form"),
        ({"judge_url": "https://me:secret@host/v1"}, r"address of host holds more than a path; the key goes in"),
        ({"judge_url": "https://host/v1?key=secret"}, r"address of host holds more than a path"),
        ({"judge_model": ""}, r"`judge_model` must not be empty"),
        ({"extra_body": "model=1"}, r"the field 'model' is set by dpkd; use --judge-model"),
        ({"extra_body": "stream=true"}, r"the field 'stream' is set by dpkd"),
        ({"extra_body": "temperature=1"}, r"'temperature' can only be removed, by temperature=null"),
        ({"extra_body": "max_tokens=5"}, r"only be removed, by max_tokens=null; use --max-tokens"),
        ({"extra_body": "tier=flex"}, r"tier=flex is not JSON; text goes in quotes"),
        ({"mode": "triple"}, r"`mode` must be pointwise or pairwise, found triple"),
        ({"concurrency": 0}, r"`concurrency` must be above 0, found 0"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse(**options)
    assert "secret" not in str(caught.value)


def test_the_url_may_have_a_path_or_a_slash() -> None:
    for url in ("http://h/v1", "http://h/v1/", "http://h/v1/chat/completions"):
        assert parse(judge_url=url).judge_url == "http://h/v1"


def test_a_cost_needs_both_prices() -> None:
    for one, other in (("price_in", "price_out"), ("price_out", "price_in")):
        flag, missing = (f"--{name.replace('_', '-')}" for name in (one, other))
        with pytest.raises(UserError, match=rf"{flag} needs {missing}.*0 if "):
            parse(**{one: 1.0})


def test_names_come_singly_and_with_commas() -> None:
    assert parse(only="a,b", sets=["c", "d, e"]).only == ("a", "b")
    assert parse(sets=["c", "d, e"]).sets == ("c", "d", "e")


def test_the_recorded_command_asks_for_the_same(tmp_path: Path) -> None:
    import shlex

    from dpkd.pipelines.commands.registry import COMMANDS
    from dpkd.pipelines.flags import add_command

    config = parse(
        only="a,b", extra_body=['tier="flex"', "seed=null"], mode="pairwise", reask=True, tries=3, judge_model="a b"
    )
    words = shlex.split(command_text(config, "judge"))
    app = typer.Typer()
    add_command(app, "judge", COMMANDS["judge"])
    parsed = typer.main.get_command(app).make_context("judge", words[2:]).params
    assert resolve(JudgeConfig, parsed_flags(parsed), None, parsed["set"]) == config


def parsed_flags(parsed: dict[str, Any]) -> dict[str, Any]:
    """What the command line gave, as the command hands it to `resolve`."""
    return {key: value for key, value in parsed.items() if key not in ("config", "set", "dry_run") and value != ()}


def test_resolved_options_can_be_read_back() -> None:
    import tomllib

    config = parse(extra_body='nested={"a": [1, null]}', price_in=2.5, price_out=0, baseline="a")
    assert JudgeConfig.parse(tomllib.loads(config.to_toml()), where="a test") == config
