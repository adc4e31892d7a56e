"""Options of `dpkd cache fidelity`. Imports nothing heavy: the command line reads it for `--help`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from dpkd.core.settings import Location, Settings
from dpkd.teacher_cache.engines.engine import LocalEngineName


class FidelityConfig(Settings):
    """Which cache is compared with which live teacher, and on how many rows."""

    set_only: ClassVar[frozenset[str]] = frozenset({"dtype", "max_num_seqs"})

    cache: Location = Field(description="directory or URL of a finished cache")
    teacher: str = Field(description="the cache's teacher: a checkpoint directory or a hub name")
    limit: int = Field(64, ge=1, description="rows to score again, spread evenly over the cache")
    engine: LocalEngineName = Field(
        "auto", description="what scores them again; auto is the kind that built the cache, where it is installed"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device of the teacher")
    as_json: bool = Field(False, description="print JSON in place of a table", json_schema_extra={"flag": "json"})
    max_num_seqs: int = Field(64, ge=1, description="requests that the engine runs at once")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="number type of the weights; off: the cache's own"
    )
