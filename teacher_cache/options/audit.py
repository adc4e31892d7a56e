"""Options of commands on a finished cache: `dpkd cache info`, `verify`, `repair`, `fidelity` and `serve-teacher`.

Imports nothing heavy: `--help` reads it.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from dpkd.core.settings import DeviceName, LocalPath, Location, Settings, split_commas
from dpkd.teacher_cache.engines.engine import LocalEngineName
from dpkd.teacher_cache.options.cache import EngineArguments


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
    pilot: bool = Field(
        False, description="also train --student a little at several K, and report its KL on held-out rows"
    )
    student: str | None = Field(None, description="with --pilot: student to train copies of")
    pilot_k: tuple[int, ...] = Field(
        (), description="with --pilot: entries per position to compare, such as 4,16,64; none: the cache's, 1/4, 1/16"
    )
    pilot_steps: int = Field(
        60, ge=1, description="with --pilot: optimiser steps of each run, by the default objective"
    )
    pilot_learning_rate: float = Field(1e-4, gt=0, description="with --pilot: peak learning rate, as of dpkd train")
    pilot_seeds: int = Field(3, ge=2, description="with --pilot: runs at each K; their spread is the noise")

    @field_validator("pilot_k", mode="before")
    @classmethod
    def _split_numbers(cls, value: object) -> object:
        return split_commas(value)

    @model_validator(mode="after")
    def _pilot_has_a_student(self) -> Self:
        if self.pilot != (self.student is not None):
            raise ValueError("--pilot needs --student, and the other way round")
        unread = self.changed("pilot_k", "pilot_steps", "pilot_learning_rate", "pilot_seeds")
        if unread and not self.pilot:
            raise ValueError(f"{', '.join(unread)} goes with --pilot: nothing else reads it")
        if any(k < 1 for k in self.pilot_k):
            raise ValueError("--pilot-k must be 1 or more")
        return self


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
    engine_arg: EngineArguments = Field({}, description="argument of vLLM, such as tensor_parallel_size=4; repeatable")
    log: LocalPath | None = Field(None, description="file for the server's log; none: standard error")
    start_timeout_s: float = Field(1800, gt=0, description="longest wait for the server to start, in seconds")
