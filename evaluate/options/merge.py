"""Options of a merged report: which evaluations, and what may differ between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from dpkd.core.settings import Settings


class MergeConfig(Settings):
    """Everything that `dpkd report` can be told."""

    set_only: ClassVar[frozenset[str]] = frozenset({"num_bootstrap", "bootstrap_seed"})

    evaluations: tuple[str, ...] = Field(
        min_length=1,
        description="directories of finished evaluations, DIR or NAME=DIR: NAME is then the name of its model, or "
        "stands before the names of its models",
        json_schema_extra={"positional": "DIR..."},
    )
    out: Path = Field(description="directory for the merged report")
    allow_different_decoding: bool = Field(
        False,
        description="compare answers that were drawn otherwise (template, temperature, top-p, seeds, longest answer); "
        "the report says which",
    )
    common_rows: bool = Field(
        False, description="compare on the rows that all evaluations of a set have, where these are not the same"
    )
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
