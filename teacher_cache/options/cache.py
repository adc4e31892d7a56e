"""Options of `dpkd cache-teacher`. Imports nothing heavy: the command line reads it for `--help`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from dpkd.core.prompts.templates import TemplateName
from dpkd.core.settings import Location, Settings, named_values
from dpkd.teacher_cache.engines.engine import EngineName

#: entries kept a position unless something else is asked for
DEFAULT_TOP_K = 64
DEFAULT_MAX_TOP_K = 128


class CacheConfig(Settings):
    """What to ask the teacher, and where to keep the answer."""

    set_only: ClassVar[frozenset[str]] = frozenset(
        {"rows_per_shard", "max_num_seqs", "dtype", "ray_replicas", "ray_cpus", "ray_gpus"}
    )

    teacher: str = Field(description="teacher: a checkpoint directory or a hub name")
    data: str | None = Field(
        None,
        description=".json, .jsonl or .parquet file, or a `datasets` NAME[:SPLIT]; a round takes the cache's prompts",
    )
    out: Location = Field(description="directory of the cache, or a URL such as s3://bucket/key")
    engine: EngineName = Field(
        "auto",
        description="what runs the models: auto is vLLM where it is installed; server: running vLLM servers; "
        "ray: vLLM replicas on a Ray cluster",
    )
    server_url: tuple[str, ...] = Field(
        (), description="with --engine server: URL of a running vLLM server; repeatable"
    )
    engine_arg: dict[str, str] = Field(
        {}, description="an argument of vLLM itself, such as tensor_parallel_size=4; repeatable"
    )
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
    top_k: int | None = Field(
        None,
        ge=0,
        description=f"entries of the teacher's distribution kept a position; 0 keeps none [{DEFAULT_TOP_K}]",
    )
    top_mass: float | None = Field(
        None, gt=0, lt=1, description="in place of --top-k: keep the fewest entries that reach this probability"
    )
    max_top_k: int | None = Field(
        None, ge=1, description=f"with --top-mass: never more entries than this [{DEFAULT_MAX_TOP_K}]"
    )
    limit: int | None = Field(None, ge=1, description="only the first N rows of the data")
    seed: int = Field(0, ge=0, description="seed of sampling")
    student: str | None = Field(None, description="a round: the student whose responses the teacher scores")
    round: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="a round: its name")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device of the models")
    rows_per_shard: int = Field(128, ge=1, description="rows a shard; a kill costs at most the shards under way")
    max_num_seqs: int = Field(64, ge=1, description="requests that the engine runs at once")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="number type of the weights")
    ray_replicas: int = Field(1, ge=1, description="with --engine ray: vLLM replicas")
    ray_cpus: float = Field(1, ge=0, description="with --engine ray: CPUs that a replica reserves")
    ray_gpus: float = Field(0, ge=0, description="with --engine ray: GPUs that a replica reserves")

    @field_validator("engine_arg", mode="before")
    @classmethod
    def _named_arguments(cls, value: object) -> object:
        return named_values(value, "KEY=VALUE", "tensor_parallel_size=4")

    @field_validator("server_url", mode="before")
    @classmethod
    def _one_url(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

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
        if self.top_k is not None and (self.top_mass is not None or self.max_top_k is not None):
            raise ValueError("--top-k keeps a fixed number; --top-mass and --max-top-k go without it")
        if self.max_top_k is not None and self.top_mass is None:
            raise ValueError("--max-top-k goes with --top-mass; for a fixed number give --top-k")
        if bool(self.server_url) != (self.engine == "server"):
            raise ValueError("--engine server and --server-url go together")
        if self.engine_arg and self.engine in ("server", "transformers"):
            raise ValueError(f"--engine-arg is for vLLM in this job; --engine {self.engine} takes none")
        return self

    @property
    def most_entries(self) -> int:
        """Entries that the engine is asked for at every position."""
        if self.top_mass is not None:
            return self.max_top_k or DEFAULT_MAX_TOP_K
        return DEFAULT_TOP_K if self.top_k is None else self.top_k
