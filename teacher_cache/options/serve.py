"""Options of `dpkd serve-teacher`. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator

from dpkd.core.settings import DeviceName, Location, Settings, named_values


class ServeConfig(Settings):
    """Which cache's teacher to serve, and where."""

    example: ClassVar[str] = "dpkd serve-teacher --cache cache --teacher teacher"

    cache: Location = Field(description="directory or URL of the finished cache whose teacher to serve")
    teacher: str | None = Field(
        None, description="the cache's teacher: a checkpoint directory or a hub name; none: as recorded in the cache"
    )
    host: str = Field(
        "127.0.0.1",
        description="address to listen on; other machines need VLLM_API_KEY, which every path but /health asks for",
    )
    insecure: bool = Field(False, description="let other machines use the server without a key")
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")
    device: DeviceName = Field("auto", description="device of the teacher; auto: CUDA if it is available")
    max_length: int | None = Field(
        None, ge=2, description="longest prompt and response together, in tokens; none: the cache's own limits"
    )
    engine_arg: dict[str, str] = Field({}, description="argument of vLLM, such as tensor_parallel_size=4; repeatable")
    log: Path | None = Field(None, description="file for the server's log; none: standard error")
    start_timeout_s: float = Field(1800, gt=0, description="longest wait for the server to start, in seconds")

    @field_validator("engine_arg", mode="before")
    @classmethod
    def _named_arguments(cls, value: object) -> object:
        return named_values(value, "KEY=VALUE", "tensor_parallel_size=4")
