"""Options of `dpkd serve-teacher`. Imports nothing heavy: the command line reads it for `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from dpkd.core.settings import Location, Settings, named_values


class ServeConfig(Settings):
    """Which cache's teacher is served, and where."""

    set_only: ClassVar[frozenset[str]] = frozenset({"start_timeout_s"})

    cache: Location = Field(description="directory or URL of the finished cache whose teacher is served")
    teacher: str | None = Field(
        None, description="the cache's teacher: a checkpoint directory or a hub name; none: as the cache was built"
    )
    host: str = Field("127.0.0.1", description="address to listen on; beyond this machine, set VLLM_API_KEY too")
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device of the teacher")
    max_length: int | None = Field(
        None, ge=2, description="longest prompt and response together, in tokens; none: the cache's own limits"
    )
    engine_arg: dict[str, str] = Field(
        {}, description="an argument of vLLM itself, such as tensor_parallel_size=4; repeatable"
    )
    log: Path | None = Field(None, description="file for what the server says; none: standard error")
    start_timeout_s: float = Field(1800, gt=0, description="longest wait for the server to come up, in seconds")

    @field_validator("engine_arg", mode="before")
    @classmethod
    def _named_arguments(cls, value: object) -> object:
        return named_values(value, "KEY=VALUE", "tensor_parallel_size=4")
