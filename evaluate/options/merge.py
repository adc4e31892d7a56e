"""Options of `dpkd report`. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, field_validator

from dpkd.core.settings import LocalPath, Settings
from dpkd.evaluate.options.comparing import ComparingOptions


class MergedOptions(Settings):
    """What `dpkd report` merges, and what may differ."""

    title: ClassVar[str] = "Evaluations"

    evaluations: tuple[str, ...] = Field(
        min_length=1,
        description="directories of finished evaluations; NAME=DIR renames the model, or prefixes the names of several",
        json_schema_extra={"positional": "DIR..."},
    )
    out: LocalPath = Field(description="directory for the merged report")
    allow_different_decoding: bool = Field(
        False,
        description="compare answers from different settings (template, temperature, top-p, seeds, length); the report "
        "lists the differences",
    )
    common_rows: bool = Field(
        False, description="if evaluations of a data set have different rows, compare on the rows they share"
    )

    judge: tuple[str, ...] = Field(
        (), description="directory of a finished dpkd judge, whose grades the page shows beside the answers; repeatable"
    )

    @field_validator("evaluations", "judge", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("evaluations")
    @classmethod
    def _differ(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({place for place in value if value.count(place) > 1}):
            raise ValueError(f"the evaluation {twice[0]!r} is given twice")
        return value


class MergeConfig(MergedOptions, ComparingOptions):
    """Options of `dpkd report`."""

    example: ClassVar[str] = "dpkd report report-a report-b --out merged"
