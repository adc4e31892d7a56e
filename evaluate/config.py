"""Options of an evaluation: which checkpoints, which data, how answers are drawn."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from dpkd.teacher_cache.engine import EngineOptions, LocalEngineName
from dpkd.teacher_cache.settings import Location, Settings, named_values
from dpkd.teacher_cache.templates import TemplateName

#: the seeds over which the paper's family (MiniLLM, DPKD) averages
PAPER_SEEDS = (10, 20, 30, 40, 50)

# names become directories and table cells, so they keep to characters that are safe in both
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class EvalConfig(Settings):
    """Everything that `dpkd eval` can be told."""

    set_only: ClassVar[frozenset[str]] = frozenset({"num_bootstrap", "bootstrap_seed", "max_num_seqs", "dtype"})

    model: dict[str, str] = Field(
        min_length=1, description="NAME=DIR: a checkpoint to evaluate and its name in the report; repeatable"
    )
    data: dict[str, str] = Field(
        min_length=1, description="NAME=FILE: rows with references (.jsonl, .json, .parquet); repeatable"
    )
    out: Path = Field(description="directory for the report, the scores and the generated answers")
    cache: Location | None = Field(
        None, description="teacher cache of the training: prompts of the data that also stand in it are counted"
    )
    engine: LocalEngineName = Field("auto", description="what runs the models; auto is vLLM where it is installed")
    template: TemplateName = Field("alpaca", description="prompt template; must be the one trained with")
    temperature: float = Field(
        1.0, ge=0.0, allow_inf_nan=False, description="sampling temperature; 0 is greedy decoding"
    )
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="nucleus: probability mass that is sampled from")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None,
        description="comma-separated seeds, one answer a row each; off: 10,20,30,40,50, or 10 when greedy",
    )
    buckets: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (30, 70),
        min_length=1,
        description="comma-separated edges of the length buckets, in words of the gold response",
    )
    max_new_tokens: int = Field(256, gt=0, description="longest answer, in tokens")
    max_prompt_tokens: int = Field(256, gt=0, description="rows with a longer prompt are left out, in tokens")
    limit: int | None = Field(None, gt=0, description="only the first so many rows of each data set; off: all")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the models run")
    num_bootstrap: int = Field(1000, ge=100, description="bootstrap resamples behind each 95% interval")
    bootstrap_seed: int = Field(0, ge=0, description="seed of the bootstrap")
    max_num_seqs: int = Field(64, gt=0, description="most answers generated at once")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="number type of the models' weights"
    )

    @field_validator("model", "data", mode="before")
    @classmethod
    def _named_paths(cls, value: Any) -> Any:
        return named_values(value, "NAME=PATH", "student=runs/dpkd")

    @field_validator("model", "data")
    @classmethod
    def _names_are_plain(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not _NAME.fullmatch(name):
                raise ValueError(f"the name {name!r} must start with a letter or digit, then only those, '.', '_', '-'")
        return value

    @field_validator("seeds", "buckets", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [part.strip() for part in value.split(",")]
        return [value] if isinstance(value, int) else value

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, value: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        if value is None:
            return None
        if not value:
            raise ValueError("no seed is given")
        if len(set(value)) != len(value):
            raise ValueError(f"a seed is given twice in {','.join(map(str, value))}")
        if info.data.get("temperature") == 0 and len(value) > 1:
            raise ValueError(f"temperature 0 gives one answer for all {len(value)} seeds; give one seed or none")
        return value

    @field_validator("buckets")
    @classmethod
    def _edges_rise(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(low >= high for low, high in pairwise(value)):
            raise ValueError(f"the edges {','.join(map(str, value))} do not rise strictly")
        return value

    def resolved_seeds(self) -> tuple[int, ...]:
        """The seeds in use: those given, else the paper's five when sampling and their first when greedy."""
        if self.seeds is not None:
            return self.seeds
        return PAPER_SEEDS if self.temperature > 0 else PAPER_SEEDS[:1]

    def engine_options(self) -> EngineOptions:
        """What an engine must hold to answer: no distribution is kept."""
        return EngineOptions(
            max_length=self.max_prompt_tokens + self.max_new_tokens,
            top_k=0,
            dtype=self.dtype,
            device=self.device,
            max_num_seqs=self.max_num_seqs,
        )
