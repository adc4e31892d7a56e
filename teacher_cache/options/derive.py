"""Options of `dpkd cache merge`, `filter` and `import`. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from dpkd.core.prompts.templates import TemplateName
from dpkd.core.settings import LocalPath, Location, Settings
from dpkd.core.urls import url_problem

#: `column op value`
CONDITION = re.compile(r"\s*(\w+)\s*(==|!=|<=|>=|<|>|(?<=\s)in(?=\s)|(?<=\s)contains(?=\s))\s*(.+?)\s*", re.DOTALL)


class CacheMergeConfig(Settings):
    """Which caches to merge, and where to."""

    example: ClassVar[str] = "dpkd cache merge first second --out both"

    caches: tuple[str, ...] = Field(
        description="directories or URLs of two or more finished caches with one tokenizer and prompt template",
        min_length=2,
        json_schema_extra={"positional": "CACHE..."},
    )
    out: Location = Field(description="directory or URL of the new cache")
    duplicates: Literal["refuse", "renumber", "rename"] = Field(
        "refuse",
        description="what to do about rows of equal example id and sample: refuse them; renumber: they are more "
        "responses to the same prompts, so samples are numbered on from the first cache's last; rename: ids mean other "
        "examples in each cache, so every id gets the last part of its cache's path in front",
    )

    @field_validator("caches")
    @classmethod
    def _holds_no_secret(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for location in value:
            if problem := url_problem(location):
                raise ValueError(problem)
        return value


class CacheFilterConfig(Settings):
    """Which rows of a cache to keep, and where."""

    example: ClassVar[str] = "dpkd cache filter cache --out kept --finish-reason stop --min-tokens 8"

    cache: Location = Field(
        description="directory or URL of a finished cache", json_schema_extra={"positional": "CACHE"}
    )
    out: Location = Field(description="directory or URL of the new cache")
    min_tokens: int | None = Field(
        None, ge=1, description="keep responses of so many tokens or more, EOS included; none: all"
    )
    max_tokens: int | None = Field(
        None, ge=1, description="keep responses of so many tokens or fewer, EOS included; none: all"
    )
    finish_reason: Literal["stop", "length"] | None = Field(
        None, description="keep responses that ended with an EOS (stop), or that the limit cut off (length); none: all"
    )
    min_logprob: float | None = Field(
        None, le=0, description="keep responses with this mean teacher log-prob a token, in nats, or more; none: all"
    )
    where: tuple[str, ...] = Field(
        (),
        description='keep rows for which "COLUMN OP VALUE" holds; OP is ==, !=, <, <=, >, >=, contains, or in with '
        "comma-separated values; repeatable: all must hold",
    )

    @field_validator("where", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _keeps_some(self) -> Self:
        for text in self.where:
            if not CONDITION.fullmatch(text):
                raise ValueError(f'--where takes "COLUMN OP VALUE" such as "origin == teacher", found {text!r}')
        if self.min_logprob is not None and not math.isfinite(self.min_logprob):
            raise ValueError(f"--min-logprob must be a finite number, found {self.min_logprob}")
        if None not in (self.min_tokens, self.max_tokens) and self.min_tokens > self.max_tokens:  # type: ignore[operator]
            raise ValueError(f"--min-tokens {self.min_tokens} is more than --max-tokens {self.max_tokens}")
        if not self.rules:
            raise ValueError(
                "nothing to filter by: give --min-tokens, --max-tokens, --finish-reason, --min-logprob or --where"
            )
        return self

    @property
    def rules(self) -> dict[str, Any]:
        """The rules that are given, by option name."""
        given = self.model_dump(mode="json", exclude={"cache", "out"}, exclude_none=True)
        return {name: value for name, value in given.items() if value != []}


class ImportConfig(Settings):
    """What to import, and as what."""

    example: ClassVar[str] = "dpkd cache import answers.jsonl --from jsonl --out cache --tokenizer TEACHER"

    source: LocalPath = Field(
        description="a .jsonl file, or a directory of DistillKit's Parquet files",
        json_schema_extra={"positional": "SRC"},
    )
    source_format: Literal["jsonl", "distillkit"] = Field(
        description="jsonl: prompts, responses and OpenAI's log-probs, one row a line; distillkit: compressed logits",
        json_schema_extra={"flag": "from"},
    )
    out: Location = Field(description="directory of the cache, or a URL such as s3://bucket/key")
    tokenizer: str = Field(description="the teacher's tokenizer: a directory or a hub name")
    teacher_name: str = Field("unknown", min_length=1, description="name of the teacher, for the record")
    template: TemplateName = Field(
        "raw", description="with --from jsonl: prompt template of the cache's prompts; raw: as they are"
    )
    compression: LocalPath | None = Field(
        None, description="with --from distillkit: its compression config; none: compression_config.yaml in SRC"
    )
    limit: int | None = Field(None, ge=1, description="import only the first N rows; none: all")
    rows_per_shard: int = Field(128, ge=1, description="rows per shard; an interrupted job repeats unfinished shards")
