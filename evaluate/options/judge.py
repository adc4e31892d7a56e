"""Options of `dpkd judge`. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from dpkd.core.settings import LocalPath, Settings, named_values
from dpkd.evaluate.options.eval import EvalConfig, NamedFields, NamedFiles, NamedSets

KEY_VARIABLE = "DPKD_JUDGE_API_KEY"

#: options that change no number, or whose content is part of the identity
FREE_OPTIONS = frozenset(
    {
        "out", "verdicts", "report", "predictions", "data", "data_dir", "prompt", "api_key_env", "allow_plain_http",
        "concurrency", "timeout_s", "tries", "retry_delay_s", "price_in", "price_out", "estimate",
    }
)  # fmt: skip

# fields of a request that dpkd sets; those of _DROPPABLE can be removed by `null`
_OURS = {"model": "--judge-model", "messages": "--prompt", "stream": None, "n": None}
_DROPPABLE = {"max_tokens": "--max-tokens", "seed": "--seed", "temperature": None}


class JudgedOptions(Settings):
    """Which answers to judge, and where to write the report."""

    title: ClassVar[str] = "Answers"

    report: LocalPath | None = Field(None, description="directory of a finished dpkd eval, whose answers to judge")
    predictions: NamedFiles = Field(
        {}, description="NAME=FILE.jsonl: answers to judge, as in dpkd eval, instead of --report; repeatable"
    )
    data: NamedSets = Field(
        {}, description="NAME=FILE: the rows that --predictions answer, as in dpkd eval; repeatable"
    )
    out: LocalPath = Field(description="directory for judge.json, the verdicts, tables and figures")
    data_dir: LocalPath | None = Field(
        None, description="directory of data sets given by name; none: that of the environment variable DPKD_DATA"
    )
    field: NamedFields = Field({}, description="NAME=FIELD: fields of the rows, as in dpkd eval; repeatable")
    buckets: str | None = Field(
        None, description="edges of the length buckets, as in dpkd eval; none: those of --report, or 30,70"
    )
    only: tuple[str, ...] = Field((), description="judge only this model's answers; none: all models; repeatable")
    sets: tuple[str, ...] = Field((), description="judge only answers to this data set; none: all sets; repeatable")
    answer_seeds: Literal["first", "all"] = Field(
        "first", description="which answers of a row to judge: that of the first seed, or all"
    )
    limit: int | None = Field(None, gt=0, description="use only the first N rows of each data set; none: all")
    sample: int | None = Field(
        None, gt=0, description="number of rows to draw from each data set (after --limit), by --seed; none: all"
    )


class EndpointOptions(Settings):
    """The judge, and how to reach it."""

    title: ClassVar[str] = "Judge"

    judge_url: str = Field(
        description="base URL of an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1", min_length=1
    )
    judge_model: str = Field(description="name of the judge model at the endpoint", min_length=1)
    api_key_env: str | None = Field(
        None, description=f"environment variable with the API key; none: {KEY_VARIABLE} if it is set", min_length=1
    )
    allow_plain_http: bool = Field(False, description="send the key unencrypted (http) to another machine")
    concurrency: int = Field(8, gt=0, description="largest number of questions in flight")
    timeout_s: float = Field(300.0, gt=0, description="longest wait for a reply, in seconds")
    tries: int = Field(8, gt=0, description="attempts per question before the run stops")
    retry_delay_s: float = Field(1.0, gt=0, description="wait before the second attempt, in seconds; then doubled")
    extra_body: dict[str, str] = Field(
        {}, description="KEY=JSON: additional field of each request; null removes a field; repeatable"
    )


class QuestionOptions(Settings):
    """What to ask."""

    title: ClassVar[str] = "Questions"

    mode: Literal["pointwise", "pairwise"] = Field(
        "pointwise", description="grade each answer from 1 to 10, or compare pairs of answers in both orders"
    )
    baseline: str | None = Field(None, description="pairwise: compare all models with this one; none: every pair")
    grade_reference: bool = Field(
        False, description="pointwise: grade the reference in the same reply, and report the ratio of the two grades"
    )
    prompt: LocalPath | None = Field(None, description="file with the prompt; none: dpkd's prompt for the mode")
    reask: bool = Field(True, description="ask once more if a reply does not end in the required form")
    max_tokens: int = Field(512, gt=0, description="longest reply of the judge, in tokens")
    seed: int = Field(0, ge=0, description="seed of each request and of --sample")


class VerdictOptions(Settings):
    """Verdicts, cost and intervals."""

    title: ClassVar[str] = "Verdicts and report"

    verdicts: LocalPath | None = Field(
        None, description="file of verdicts, to share them between runs; none: verdicts.jsonl in --out"
    )
    estimate: bool = Field(False, description="count questions, estimate tokens and cost, and ask nothing")
    price_in: float | None = Field(
        None, ge=0, description="price per million prompt tokens, in any currency; none: no cost"
    )
    price_out: float | None = Field(
        None, ge=0, description="price per million completion tokens, in the same currency; none: no cost"
    )
    num_sign_flips: int = Field(
        10_000, ge=100, description="random sign flips per p-value, at least 40 per comparison of a set"
    )
    sign_flip_seed: int = Field(0, ge=0, description="seed of the sign flips")


class JudgeConfig(JudgedOptions, EndpointOptions, QuestionOptions, VerdictOptions):
    """What `dpkd judge` asks of which judge."""

    one_of: ClassVar[tuple[tuple[str, ...], ...]] = (("report", "predictions"),)
    example: ClassVar[str] = (
        "dpkd judge --report report --judge-url http://127.0.0.1:8000/v1 --judge-model NAME --out judge"
    )

    @field_validator("only", "sets", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)):
            return value
        return tuple(part.strip() for text in texts for part in str(text).split(","))

    @field_validator("extra_body", mode="before")
    @classmethod
    def _named_json(cls, value: Any) -> Any:
        return named_values(value, "KEY=JSON", "top_p=0.9")

    @field_validator("extra_body")
    @classmethod
    def _extra_body_is_json(cls, value: dict[str, str]) -> dict[str, str]:
        for key, text in value.items():
            if key in _OURS:
                instead = f"; use {_OURS[key]}" if _OURS[key] else ""
                raise ValueError(f"the field {key!r} is set by dpkd{instead}")
            try:
                parsed = json.loads(text)
            except ValueError:
                raise ValueError(f"{key}={text} is not JSON; text goes in quotes, as in 'tier=\"flex\"'") from None
            if key in _DROPPABLE and parsed is not None:
                instead = f"; use {_DROPPABLE[key]}" if _DROPPABLE[key] else ""
                raise ValueError(f"the field {key!r} can only be removed, by {key}=null{instead}")
        return value

    @field_validator("judge_url")
    @classmethod
    def _url_is_plain(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{value!r} is not an address of the form https://HOST/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            # the address is printed and recorded, so it must not contain a secret
            raise ValueError(f"the address of {parts.hostname} holds more than a path; the key goes in {KEY_VARIABLE}")
        return value.rstrip("/").removesuffix("/chat/completions")

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        rows = [key for key in ("predictions", "data", "field", "buckets") if getattr(self, key)]
        if self.report is not None and rows:
            raise ValueError(
                f"give --report or {' and '.join(map(self.flag, rows))}, not both: a report has its own rows, answers "
                "and buckets"
            )
        if self.report is None:
            self.eval_config()
        for one, other in (("price_in", "price_out"), ("price_out", "price_in")):
            if getattr(self, one) is not None and getattr(self, other) is None:
                raise ValueError(f"{self.flag(one)} needs {self.flag(other)} (0 if those tokens cost nothing)")
        if self.grade_reference and self.mode == "pairwise":
            raise ValueError("--grade-reference needs --mode pointwise: references are not compared in pairs")
        return self

    def cost(self, prompt: float, completion: float) -> float | None:
        """Of so many tokens of prompts and of replies, in the currency of the prices; None without prices."""
        if self.price_in is None or self.price_out is None:
            return None
        return (prompt * self.price_in + completion * self.price_out) / 1e6

    def eval_config(self) -> EvalConfig:
        """The options of a `dpkd eval` that reads these predictions; raises `UserError` for those that it refuses."""
        given = {key: getattr(self, key) for key in ("predictions", "data", "data_dir", "field", "out", "buckets")}
        values = {key: value for key, value in given.items() if value}
        return EvalConfig.parse(values, where="the options", flags=given)

    def verdicts_path(self) -> Path:
        """The file of verdicts."""
        return self.verdicts or self.out / "verdicts.jsonl"

    def request_body(self) -> dict[str, Any]:
        """Fields of every request, besides its messages."""
        body: dict[str, Any] = {
            "model": self.judge_model,
            "temperature": 0.0,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
        }
        for key, text in self.extra_body.items():
            body[key] = json.loads(text)
            if body[key] is None:
                del body[key]
        return body
