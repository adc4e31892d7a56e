"""Options of `dpkd cache-teacher`. Imports nothing heavy: the command line reads it for `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from dpkd.teacher_cache.engine import EngineName
from dpkd.teacher_cache.settings import Settings
from dpkd.teacher_cache.templates import TemplateName


class CacheConfig(Settings):
    """What to ask the teacher, and where to keep the answer."""

    set_only: ClassVar[frozenset[str]] = frozenset({"rows_per_shard", "max_num_seqs", "dtype"})

    teacher: str = Field(description="teacher: a checkpoint directory or a hub name")
    data: str | None = Field(
        None,
        description=".json, .jsonl or .parquet file, or a `datasets` NAME[:SPLIT]; a round takes the cache's prompts",
    )
    out: Path = Field(description="directory of the cache")
    engine: EngineName = Field("auto", description="what runs the models; auto is vLLM where it is installed")
    responses: Literal["teacher", "reference", "both"] = Field(
        "teacher", description="whose responses are kept: the teacher's own, the data's references, or both"
    )
    template: TemplateName = Field("alpaca", description="prompt template; chat is the tokenizer's own")
    max_prompt_tokens: int = Field(
        256, ge=1, description="rows with a longer prompt are left out and listed, in tokens"
    )
    max_new_tokens: int = Field(256, ge=1, description="longest response, in tokens, EOS included")
    temperature: float = Field(1.0, ge=0, description="sampling temperature; 0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus of sampling")
    num_samples: int = Field(1, ge=1, description="teacher responses a prompt")
    top_k: int = Field(64, ge=0, description="entries of the teacher's distribution kept a position; 0 keeps none")
    limit: int | None = Field(None, ge=1, description="only the first N rows of the data")
    seed: int = Field(0, ge=0, description="seed of sampling")
    student: str | None = Field(None, description="a round: the student whose responses the teacher scores")
    round: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="a round: its name")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device of the models")
    rows_per_shard: int = Field(128, ge=1, description="rows a shard; a kill costs at most the shards under way")
    max_num_seqs: int = Field(64, ge=1, description="requests that the engine runs at once")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="number type of the weights")

    @model_validator(mode="after")
    def _fits_together(self) -> CacheConfig:
        if (self.student is None) != (self.round is None):
            raise ValueError("a round needs both --student and --round")
        if self.student is None and self.data is None:
            raise ValueError("--data is needed")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                "greedy decoding (temperature 0) gives the same response every time: num_samples must be 1"
            )
        return self
