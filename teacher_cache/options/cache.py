"""Options of `dpkd cache-teacher`. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from dpkd.core.prompts.templates import TemplateName
from dpkd.core.settings import Address, DeviceName, Location, Settings, TemplateArguments, named_values
from dpkd.teacher_cache.engines.engine import EngineName
from dpkd.teacher_cache.engines.openai.options import EndpointOptions

#: entries kept per position by default
DEFAULT_TOP_K = 64
DEFAULT_MAX_TOP_K = 128

#: arguments of vLLM by name, as text
EngineArguments = Annotated[
    dict[str, str], BeforeValidator(lambda value: named_values(value, "KEY=VALUE", "tensor_parallel_size=4"))
]

#: options of how the teacher draws responses: a cache of references alone reads none of them
OF_DRAWING = ("num_samples", "temperature", "top_p", "seed")
_OF_RAY = ("ray_replicas", "ray_cpus", "ray_gpus")
#: options of models on this machine, by the engines that have none here. A server's dtype is what the cache records
_LOCAL_ON = {"server": ("device",), "openai": ("device", "dtype")}


class SourceOptions(Settings):
    """The teacher, the prompts and the output."""

    title: ClassVar[str] = "Data"

    teacher: str = Field(description="teacher: a checkpoint directory or a hub name")
    data: str | None = Field(
        None, description="prompts: a .json, .jsonl or .parquet file, or datasets NAME[:SPLIT]; a round has the cache's"
    )
    out: Location = Field(description="directory of the cache, or a URL such as s3://bucket/key")
    responses: Literal["teacher", "reference", "both"] = Field(
        "teacher", description="responses to cache: the teacher's own, the references of the data, or both"
    )
    template: TemplateName = Field("alpaca", description="prompt template; chat is that of the teacher's tokenizer")
    template_arg: TemplateArguments = Field(
        {}, description="variable of the chat template, such as enable_thinking=false; repeatable"
    )
    turns: Literal["last", "all"] = Field(
        "last", description="turns of the assistant to cache in rows of `messages`: the last, or all"
    )
    thinking: Literal["keep", "drop"] = Field(
        "keep",
        description="thinking in responses (<think> ... </think>): learn from it, or only from the answer behind it, "
        "which the teacher still gives after its thinking",
    )
    limit: int | None = Field(None, ge=1, description="use only the first N rows of the data; none: all")
    max_prompt_tokens: int = Field(256, ge=1, description="skip (and list) rows with a longer prompt, in tokens")
    student: str | None = Field(
        None, description="build a round: the student whose responses the teacher scores; none: build the cache"
    )
    round: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="build a round: its name; none: build the cache"
    )


class SamplingOptions(Settings):
    """How responses are drawn."""

    title: ClassVar[str] = "Responses"

    max_new_tokens: int = Field(
        256, ge=1, description="longest response, in tokens, EOS included; of a round: the cache's"
    )
    temperature: float = Field(1.0, ge=0, description="sampling temperature; 0 is greedy; of a round: the cache's")
    top_p: float = Field(1.0, gt=0, le=1, description="top-p (nucleus) of sampling; of a round: the cache's")
    teacher_mix: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="build a round: share of the teacher in the distribution that draws each token (MiniLLM: 0.2); "
        "needs --engine transformers; none: the student alone",
    )
    score_cached: bool = Field(
        False, description="build a round: also score the cache's responses with the student (for dpkd train --offset)"
    )
    num_samples: int = Field(1, ge=1, description="teacher responses per prompt")
    seed: int = Field(0, ge=0, description="seed of sampling")


class DistributionOptions(Settings):
    """What is kept of the teacher's distribution at each position."""

    title: ClassVar[str] = "Distributions"

    top_k: int | None = Field(
        None,
        ge=0,
        description="entries of the teacher's distribution to keep per position; 0: keep no distributions; none: "
        f"{DEFAULT_TOP_K}, or by --top-mass; of an endpoint: as many as it returns, up to {DEFAULT_TOP_K}",
    )
    top_mass: float | None = Field(
        None, gt=0, lt=1, description="keep the fewest entries that reach this probability; none: --top-k entries"
    )
    max_top_k: int | None = Field(
        None, ge=1, description=f"with --top-mass: largest number of entries per position; none: {DEFAULT_MAX_TOP_K}"
    )


class EngineChoiceOptions(Settings):
    """What runs the models, and where."""

    title: ClassVar[str] = "Engine"

    engine: EngineName = Field(
        "auto",
        description="engine that runs the models; auto: vLLM if it is installed; server: running vLLM servers; ray: "
        "vLLM replicas on a Ray cluster; openai: an endpoint that speaks OpenAI's protocol",
    )
    device: DeviceName = Field("auto", description="device of the models; auto: CUDA if it is available")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="number type of the weights")
    max_num_seqs: int = Field(64, ge=1, description="largest number of requests in a batch")
    rows_per_shard: int = Field(128, ge=1, description="rows per shard; an interrupted job repeats unfinished shards")
    server_url: tuple[Address, ...] = Field(
        (), description="with --engine server: URL of a running vLLM server; repeatable"
    )
    engine_arg: EngineArguments = Field({}, description="argument of vLLM, such as tensor_parallel_size=4; repeatable")
    ray_replicas: int = Field(1, ge=1, description="with --engine ray: number of vLLM replicas")
    ray_cpus: float = Field(1, ge=0, description="with --engine ray: CPUs per replica")
    ray_gpus: float = Field(0, ge=0, description="with --engine ray: GPUs per replica")

    @field_validator("server_url", mode="before")
    @classmethod
    def _one_url(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class CostOptions(Settings):
    """What a job would cost. These options are not saved with a cache."""

    title: ClassVar[str] = "Cost"

    dry_run: bool = Field(
        False, exclude=True, description="run a pilot of a few rows, print what the job would cost, and write nothing"
    )
    pilot_rows: int = Field(32, ge=4, exclude=True, description="with --dry-run: rows of the pilot")
    price_per_hour: float | None = Field(
        None,
        ge=0,
        exclude=True,
        description="with --dry-run: price of an hour of a GPU, or of this machine; none: unknown",
    )


class CacheConfig(
    SourceOptions, SamplingOptions, DistributionOptions, EngineChoiceOptions, EndpointOptions, CostOptions
):
    """What to ask the teacher, and where to cache the answers."""

    one_of: ClassVar[tuple[tuple[str, ...], ...]] = (("data", "round"),)
    example: ClassVar[str] = "dpkd cache-teacher --teacher teacher --data train.jsonl --out cache"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.student is None) != (self.round is None):
            raise ValueError("a round needs --student and --round")
        for key in ("teacher_mix", "score_cached"):
            if getattr(self, key) and self.round is None:
                raise ValueError(f"{self.flag(key)} goes with --round: it is about the student's responses")
        if self.teacher_mix is not None and self.engine not in ("auto", "transformers"):
            raise ValueError(f"--teacher-mix needs both models at once: --engine transformers, not {self.engine}")
        if self.teacher_mix is not None and (self.temperature, self.top_p) != (1, 1):
            raise ValueError("--teacher-mix mixes the models' own distributions: leave --temperature and --top-p at 1")
        # a round draws from the student, whatever the responses of its cache are
        if self.responses == "reference" and self.round is None and (given := self.changed(*OF_DRAWING)):
            raise ValueError(
                f"{', '.join(given)} goes with --responses teacher or both: references are given, and nothing is drawn"
            )
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError("--temperature 0 gives the same response every time: --num-samples must be 1")
        if self.top_k is not None and (self.top_mass is not None or self.max_top_k is not None):
            raise ValueError("give --top-k or --top-mass (with --max-top-k), not both")
        if self.max_top_k is not None and self.top_mass is None:
            raise ValueError("--max-top-k needs --top-mass; for a fixed number give --top-k")
        if bool(self.server_url) != (self.engine == "server"):
            raise ValueError("--engine server needs --server-url, and the other way round")
        for key in ("pilot_rows", "price_per_hour"):
            if key in self.model_fields_set and not self.dry_run:
                raise ValueError(f"{self.flag(key)} goes with --dry-run")
        for engine, keys in (("ray", _OF_RAY), ("openai", tuple(EndpointOptions.model_fields))):
            if self.engine != engine and (given := self._changed(keys)):
                raise ValueError(f"{self.flag(given[0])} goes with --engine {engine}")
        if self.engine in _LOCAL_ON and (given := self._changed(_LOCAL_ON[self.engine])):
            raise ValueError(f"{self.flag(given[0])} is for models on this machine; --engine {self.engine} takes none")
        if self.engine == "openai" and (problem := self._problem_of_the_endpoint()):
            raise ValueError(problem)
        if self.engine_arg and self.engine in ("server", "transformers", "openai"):
            raise ValueError(f"--engine-arg is for vLLM; --engine {self.engine} takes none")
        if self.engine_arg and self.teacher_mix is not None:
            raise ValueError("--engine-arg is for vLLM; --teacher-mix needs --engine transformers, which takes none")
        return self

    def _problem_of_the_endpoint(self) -> str | None:
        if missing := [self.flag(key) for key in ("teacher_url", "teacher_model") if getattr(self, key) is None]:
            return f"--engine openai needs {' and '.join(missing)}"
        if self.responses != "teacher" or self.round is not None:
            return "--engine openai answers prompts and scores nothing: --responses teacher, and no --round"
        if self.teacher_api == "chat" and self.template != "chat":
            return f"--teacher-api chat uses the endpoint's chat template: give --template chat, not {self.template}"
        if self.template_arg and self.teacher_api == "chat":
            return "--template-arg is for a template on this machine: --teacher-api chat uses the endpoint's own"
        prices = self.price_in, self.price_out
        if self.max_cost is not None and (None in prices or not any(prices)):
            return "--max-cost needs --price-in and --price-out, the prices of a million tokens"
        if self.price_per_hour is not None:
            return "--price-per-hour is for models on this machine: give --price-in and --price-out"
        return None

    def _changed(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that do not have their default."""
        fields = type(self).model_fields
        return [key for key in keys if getattr(self, key) != fields[key].default]

    @property
    def most_entries(self) -> int:
        """Number of entries to request at every position."""
        if self.top_mass is not None:
            return self.max_top_k or DEFAULT_MAX_TOP_K
        return DEFAULT_TOP_K if self.top_k is None else self.top_k
