"""Options of `dpkd cache info`, `verify`, `repair` and `fidelity`. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from dpkd.core.settings import DeviceName, Location, Settings
from dpkd.teacher_cache.engines.engine import LocalEngineName


class FidelityConfig(Settings):
    """Which cache to compare with which live teacher, and on how many rows."""

    example: ClassVar[str] = "dpkd cache fidelity --cache cache --teacher teacher"

    cache: Location = Field(description="directory or URL of a finished cache")
    teacher: str = Field(description="the cache's teacher: a checkpoint directory or a hub name")
    limit: int = Field(64, ge=1, description="number of rows to score again, spread evenly over the cache")
    engine: LocalEngineName = Field(
        "auto", description="engine that scores them; auto: the kind that built the cache, if it is installed"
    )
    device: DeviceName = Field("auto", description="device of the teacher; auto: CUDA if it is available")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="number type of the weights; none: that of the cache"
    )
    max_num_seqs: int = Field(64, ge=1, description="largest number of requests in a batch")
    as_json: bool = Field(False, description="print JSON instead of a table", json_schema_extra={"flag": "json"})


class InfoOptions(Settings):
    """Which cache to describe, and how."""

    example: ClassVar[str] = "dpkd cache info cache"

    location: Location = Field(
        description="directory or URL of a finished cache", json_schema_extra={"positional": "CACHE"}
    )
    samples: int = Field(3, ge=0, description="number of rows of each origin to show")
    as_json: bool = Field(False, description="print JSON", json_schema_extra={"flag": "json"})


class VerifyOptions(Settings):
    """Which cache to verify."""

    example: ClassVar[str] = "dpkd cache verify cache"

    location: Location = Field(
        description="directory or URL of a finished cache", json_schema_extra={"positional": "CACHE"}
    )


class RepairOptions(Settings):
    """Which cache to repair."""

    example: ClassVar[str] = "dpkd cache repair cache"

    location: Location = Field(
        description="directory or URL of a finished cache; models and data must be where they were when it was built",
        json_schema_extra={"positional": "CACHE"},
    )
