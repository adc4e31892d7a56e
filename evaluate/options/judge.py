"""Options of `dpkd judge`: which answers, which judge, and how to ask it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from dpkd.core.errors import UserError
from dpkd.core.settings import Settings, named_values
from dpkd.evaluate.options.eval import KNOWN_SETS, SET_PREFIX, EvalConfig

KEY_VARIABLE = "DPKD_JUDGE_API_KEY"

#: options that change no number, or whose content is part of the identity
FREE_OPTIONS = frozenset(
    {
        "out", "verdicts", "report", "predictions", "data", "data_dir", "prompt", "api_key_env", "allow_plain_http",
        "concurrency", "timeout_s", "tries", "retry_delay_s", "prompt_price", "completion_price", "estimate",
    }
)  # fmt: skip

# fields of a request that dpkd sets, with the option to use instead; those in _DROPPABLE can be removed by `null`
_OURS = {"model": "--judge-model", "messages": "--prompt", "stream": None, "n": None}
_DROPPABLE = {"max_tokens": "--max-tokens", "seed": "--seed", "temperature": None}


class JudgeConfig(Settings):
    """The options of `dpkd judge`."""

    set_only: ClassVar[frozenset[str]] = frozenset(
        {"timeout_s", "tries", "retry_delay_s", "num_bootstrap", "bootstrap_seed"}
    )

    report: Path | None = Field(None, description="directory of a finished `dpkd eval` with the answers to judge")
    predictions: dict[str, str] = Field(
        {}, description="NAME=FILE.jsonl: answers to judge, as for `dpkd eval`; instead of --report; repeatable"
    )
    data: dict[str, str] = Field(
        {}, description="NAME=FILE: the rows that --predictions answer, as for `dpkd eval`; repeatable"
    )
    data_dir: Path | None = Field(
        None, description="directory of the sets given by name; none: the environment variable DPKD_DATA"
    )
    field: dict[str, str] = Field({}, description="NAME=FIELD: fields of the rows, as for `dpkd eval`; repeatable")
    buckets: str | None = Field(
        None, description="edges of the length buckets, as for `dpkd eval`; none: those of the report, or 30,70"
    )
    only: tuple[str, ...] = Field((), description="judge only the answers of this model; repeatable")
    sets: tuple[str, ...] = Field((), description="judge only answers to this data set; repeatable")
    out: Path = Field(description="directory for judge.json, the verdicts, tables and figures")
    verdicts: Path | None = Field(
        None,
        description="file of verdicts, which runs over other rows or models can share; none: verdicts.jsonl in --out",
    )
    judge_url: str = Field(
        description="base URL of an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1", min_length=1
    )
    judge_model: str = Field(description="name of the judge model at the endpoint", min_length=1)
    api_key_env: str | None = Field(
        None, description=f"environment variable with the key; none: {KEY_VARIABLE}, if it is set", min_length=1
    )
    allow_plain_http: bool = Field(
        False, description="allow sending the key over http to another machine, where others can read it"
    )
    mode: Literal["pointwise", "pairwise"] = Field(
        "pointwise",
        description="ask for a grade from 1 to 10 for each answer, or compare pairs of answers in both orders",
    )
    baseline: str | None = Field(None, description="model to compare all others with; none: every pair of models")
    grade_reference: bool = Field(
        False, description="pointwise: also ask for a grade of the reference, and report the ratio of the two"
    )
    prompt: Path | None = Field(None, description="file with the prompt; none: the prompt of dpkd for the mode")
    reask: bool = Field(False, description="ask once more if a reply does not end with the required line")
    limit: int | None = Field(None, gt=0, description="use only the first rows of each data set; none: all")
    sample: int | None = Field(
        None, gt=0, description="number of rows to draw by --seed from each data set (after --limit); none: all"
    )
    answer_seeds: Literal["first", "all"] = Field(
        "first", description="which answers of a row to judge: those of the first seed, or of all"
    )
    max_tokens: int = Field(512, gt=0, description="length of the longest reply, in tokens")
    seed: int = Field(0, ge=0, description="seed sent with each question, and seed of --sample")
    extra_body: dict[str, str] = Field(
        {},
        description="KEY=JSON: an additional field of each request; null removes a field that dpkd sends; repeatable",
    )
    concurrency: int = Field(8, gt=0, description="number of questions asked at once")
    timeout_s: float = Field(300.0, gt=0, description="longest wait for one reply, in seconds")
    tries: int = Field(8, gt=0, description="tries of a question before the run stops, if the endpoint fails")
    retry_delay_s: float = Field(
        1.0, gt=0, description="wait before the second try, in seconds; doubled for each further one"
    )
    prompt_price: float | None = Field(None, ge=0, description="price of a million prompt tokens, in any currency")
    completion_price: float | None = Field(None, ge=0, description="price of a million completion tokens")
    estimate: bool = Field(False, description="only count the questions and estimate their tokens")
    num_bootstrap: int = Field(10_000, ge=100, description="bootstrap resamples behind each 95% interval")
    bootstrap_seed: int = Field(0, ge=0, description="seed of the bootstrap")

    @field_validator("predictions", "data", mode="before")
    @classmethod
    def _named_paths(cls, value: Any) -> Any:
        pairs = [value] if isinstance(value, str) else value
        if isinstance(pairs, (list, tuple)):
            pairs = [f"{pair}={SET_PREFIX}{pair}" if pair in KNOWN_SETS else pair for pair in pairs]
        return named_values(pairs, "NAME=PATH", "ours=answers.jsonl")

    @field_validator("field", mode="before")
    @classmethod
    def _named_fields(cls, value: Any) -> Any:
        return named_values(value, "NAME=FIELD", "instruction=question")

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
                raise ValueError(f"the field {key!r} can only be left out, by {key}=null{instead}")
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
        if self.report is not None and (self.predictions or self.data or self.buckets or self.field):
            raise UserError(
                "answers come either from a report or from predictions",
                found="--report together with --predictions, --data, --field or --buckets",
                where="the options",
                advice="Leave the others out: the report has its own rows, answers and buckets",
            )
        if self.report is None:
            if not self.predictions:
                raise UserError(
                    "there is nothing to judge",
                    found="neither a report nor predictions",
                    where="the options",
                    advice="Give --report DIR, or --predictions NAME=FILE with --data NAME=FILE",
                )
            self.eval_config()
        if self.grade_reference and self.mode == "pairwise":
            raise UserError(
                "references can only be graded, not compared in pairs",
                found="--grade-reference with --mode pairwise",
                where="the options",
                advice="Give --mode pointwise",
            )
        return self

    def eval_config(self) -> EvalConfig:
        """The options with which `dpkd eval` would read the predictions; raises `UserError` as it would."""
        given = {key: getattr(self, key) for key in ("predictions", "data", "data_dir", "field", "out", "buckets")}
        return EvalConfig.parse({key: value for key, value in given.items() if value}, where="the options")

    @property
    def key_may_be_sent(self) -> bool:
        """Whether the key is safe on its way to the endpoint, or the options allow sending it anyway."""
        parts = urlsplit(self.judge_url)
        return parts.scheme == "https" or is_loopback(parts.hostname or "") or self.allow_plain_http

    def verdicts_path(self) -> Path:
        """The file of verdicts."""
        return self.verdicts or self.out / "verdicts.jsonl"

    def request_body(self) -> dict[str, Any]:
        """The fields of every request, except its messages."""
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


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine, by name or address."""
    from ipaddress import ip_address  # late: --help must be quick

    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
