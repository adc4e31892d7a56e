"""Options of `dpkd report`: which evaluations to merge, and what may differ between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from dpkd.core.settings import Settings


class MergeConfig(Settings):
    """The options of `dpkd report`."""

    set_only: ClassVar[frozenset[str]] = frozenset({"num_bootstrap", "bootstrap_seed"})

    evaluations: tuple[str, ...] = Field(
        min_length=1,
        description="directories of finished evaluations, DIR or NAME=DIR: NAME renames its model, or is the prefix of "
        "its models if there are several",
        json_schema_extra={"positional": "DIR..."},
    )
    out: Path = Field(description="directory for the merged report")
    allow_different_decoding: bool = Field(
        False,
        description="compare answers drawn in different ways (template, temperature, top-p, seeds, longest answer); "
        "the report says how",
    )
    common_rows: bool = Field(False, description="compare only the rows that all evaluations of a set have")
    num_bootstrap: int = Field(
        10_000, ge=100, description="bootstrap resamples behind each 95% interval and each p-value"
    )
    bootstrap_seed: int = Field(0, ge=0, description="seed of the bootstrap")

    @field_validator("evaluations", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("evaluations")
    @classmethod
    def _differ(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({place for place in value if value.count(place) > 1}):
            raise ValueError(f"the evaluation {twice[0]!r} is given twice")
        return value
