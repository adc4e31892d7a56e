"""The command in a report: it gives the same options again and contains no secret."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import typer

from dpkd.core.errors import UserError
from dpkd.core.settings import Settings
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.evaluate.options.merge import MergeConfig
from dpkd.evaluate.report.provenance import command_text, redacted
from dpkd.pipelines.commands.registry import COMMANDS
from dpkd.pipelines.flags import add_command, resolve


def _parsed(text: str, config_type: type[Settings]) -> Settings:
    """The options that the command line makes of a command."""
    program, name, *arguments = shlex.split(text)
    assert program == "dpkd"
    app = typer.Typer()
    add_command(app, name, COMMANDS[name])
    given = typer.main.get_command(app).make_context(name, arguments).params
    settings, path = given.pop("set"), given.pop("config")
    assert given.pop("dry_run") is False
    return resolve(config_type, given, path, settings)


@pytest.mark.parametrize(
    "options",
    [
        {"model": "m=runs/m", "data": "d=d.jsonl", "out": "o"},
        {
            "model": ["a=runs/a b", "b=owner/model"],
            "predictions": ["p:x=p's.jsonl", "p:y=q.jsonl"],
            "data": ["x=x.jsonl", "y=org/set:test"],
            "run": "r=runs/r",
            "field": "output=answer",
            "out": "o $HOME",
            "seeds": "1,2",
            "buckets": "median,mean",
            "temperature": 0.7,
            "limit": 3,
            "cache": "s3://bucket/cache",
            "num_sign_flips": 200,
            "max_num_seqs": 3,
            "dtype": "bfloat16",
        },
    ],
)
def test_the_command_of_an_evaluation_makes_its_options_again(options: dict[str, Any]) -> None:
    config = EvalConfig.parse(options, where="a test")
    assert _parsed(command_text(config, "eval"), EvalConfig) == config


def test_every_option_that_is_not_the_default_is_named() -> None:
    config = EvalConfig.parse({"model": "m=x", "data": "d=d.jsonl", "out": "o", "perplexity": False}, where="a test")
    assert command_text(config, "eval") == "dpkd eval --model m=x --data d=d.jsonl --out o --no-perplexity"
    assert _parsed(command_text(config, "eval"), EvalConfig) == config


def test_the_command_of_a_merged_report_makes_its_options_again() -> None:
    options = {"evaluations": ["a", "n=b c"], "out": "o", "common_rows": True, "sign_flip_seed": 4}
    config = MergeConfig.parse(options, where="a test")
    text = command_text(config, "report")
    assert text == "dpkd report a 'n=b c' --out o --common-rows --sign-flip-seed 4"
    assert _parsed(text, MergeConfig) == config


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("s3://KEY:secret@bucket/cache", "s3://***@bucket/cache"),
        ("https://host/cache?token=abc&part=2", "https://host/cache?token=***&part=***"),
        ("name=hf_abcdefghijklmnopqrst", "name=***"),
        ("sk-proj-0123456789abcdef", "***"),
        ("runs/a?b=c", "runs/a?b=c"),
        ("mail@host", "mail@host"),
        ("s3://bucket/cache", "s3://bucket/cache"),
    ],
)
def test_secrets_are_left_out(text: str, safe: str) -> None:
    assert redacted(text) == safe


def test_no_command_contains_a_secret() -> None:
    url = "s3://id:secret@bucket/c?key=secret"
    config = EvalConfig.parse({"model": "m=x", "data": f"d={url}", "out": "o"}, where="a test")
    text = command_text(config, "eval")
    assert "secret" not in text
    assert "d=s3://***@bucket/c?key=***" in shlex.split(text)
    with pytest.raises(UserError, match="the s3 URL holds a user name or password") as caught:
        EvalConfig.parse({"model": "m=x", "data": "d=d.jsonl", "out": "o", "cache": url}, where="a test")
    assert url not in str(caught.value)
