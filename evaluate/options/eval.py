"""Options of `dpkd eval`: which models, which data, how answers are drawn and scored."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast, get_args

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from dpkd.core.errors import UserError
from dpkd.core.prompts.templates import TemplateName
from dpkd.core.settings import Location, Settings, named_values, split_commas
from dpkd.evaluate.metrics.buckets import Edge, Statistic
from dpkd.evaluate.metrics.rouge import RougeTokenizer
from dpkd.teacher_cache.engines.engine import EngineOptions, LocalEngineName

#: the seeds over which the paper's family (MiniLLM, DPKD) averages
PAPER_SEEDS = (10, 20, 30, 40, 50)

#: evaluation sets that are known by name, and the files that a data directory may hold them under, best first
KNOWN_SETS: dict[str, tuple[str, ...]] = {
    "dolly": ("dolly_eval.jsonl", "dolly.jsonl", "dolly/valid.jsonl"),
    "self-instruct": ("self_instruct_252.jsonl", "self_instruct.jsonl", "self-inst/valid.jsonl"),
    "s-ni": ("sni_11plus.jsonl", "sni.jsonl", "sinst/11_/valid.jsonl"),
    "vicuna": ("vicuna.jsonl", "vicuna/valid.jsonl"),
    "unni": ("unni_11plus.jsonl", "unni.jsonl", "uinst/11_/valid.jsonl"),
}
#: prefix of the name of a known set in the options; its file is found in the data directory later
SET_PREFIX = "set:"
ROW_FIELDS = ("instruction", "input", "output", "messages", "prompt", "id", "category")

# names become directories and table cells, so they keep to characters that are safe in both
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _as_edge(value: Any) -> Edge:
    if value in get_args(Statistic):
        return cast(Statistic, value)
    if str(value).isdecimal() and int(value) > 0:
        return int(value)
    raise ValueError(f"{value!r} is neither a length above 0 nor `median` or `mean`")


class EvalConfig(Settings):
    """The options of `dpkd eval`."""

    set_only: ClassVar[frozenset[str]] = frozenset({"num_bootstrap", "bootstrap_seed", "max_num_seqs", "dtype"})

    model: dict[str, str] = Field(
        {}, description="NAME=DIR: a checkpoint to evaluate and its name in the report; repeatable"
    )
    predictions: dict[str, str] = Field(
        {},
        description="NAME=FILE.jsonl: existing answers, one `prediction` per line in the order of the set's rows or by "
        "`example_id`; NAME:SET=FILE if there are several sets; repeatable",
    )
    data: dict[str, str] = Field(
        min_length=1,
        description="NAME=FILE: rows with references (.jsonl, .json, .parquet, or a datasets name); or only the name "
        f"of a set in --data-dir: {', '.join(KNOWN_SETS)}; repeatable",
    )
    data_dir: Path | None = Field(
        None, description="directory of the sets given by name; none: the environment variable DPKD_DATA"
    )
    run: dict[str, str] = Field(
        {},
        description="NAME=DIR: a run of `dpkd train` whose curves the report shows; models that are runs are "
        "included automatically; repeatable",
    )
    field: dict[str, str] = Field(
        {},
        description=f"NAME=FIELD: the field of the rows to use as {', '.join(ROW_FIELDS[:-1])} or {ROW_FIELDS[-1]}; "
        "repeatable",
    )
    out: Path = Field(description="directory for the report, the scores and the generated answers")
    cache: Location | None = Field(
        None,
        description="teacher cache of the training: count prompts of the data that are also in it, and measure each "
        "model's divergence from its distributions",
    )
    cache_rows: int = Field(
        256, ge=0, description="largest number of rows of --cache for measuring divergences; 0 measures none"
    )
    perplexity: bool = Field(True, description="measure the perplexity of the gold responses under each model")
    train_data: str | None = Field(
        None, description="rows that the models were trained on: count prompts of the data that are also in them"
    )
    generations: Path | None = Field(
        None,
        description="directory of generated answers, which evaluations with other metrics or buckets can share; "
        "none: `generations` in --out",
    )
    engine: LocalEngineName = Field(
        "auto", description="what runs the models; auto is vLLM if it is installed, else transformers"
    )
    template: TemplateName = Field("alpaca", description="prompt template; the one that the models were trained with")
    temperature: float = Field(
        1.0, ge=0.0, allow_inf_nan=False, description="sampling temperature; 0 is greedy decoding"
    )
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="probability mass of nucleus sampling")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None,
        description="comma-separated seeds, with one answer per row each; none: 10,20,30,40,50, or 10 if greedy",
    )
    buckets: tuple[Annotated[int | Statistic, BeforeValidator(_as_edge)], ...] = Field(
        (30, 70),
        min_length=1,
        description="comma-separated edges of the length buckets: numbers, or `median` and `mean` of the set's gold "
        "responses",
    )
    bucket_by: Literal["words", "tokens"] = Field(
        "words", description="unit of lengths; tokens are those of the first model"
    )
    bucket_of: Literal["reference", "prediction"] = Field(
        "reference", description="whose length decides the bucket: that of the gold response or of the answer"
    )
    rouge_tokenizer: RougeTokenizer = Field(
        "default",
        description="tokens of Rouge: default keeps only a-z and 0-9, stemmed; whitespace and character suit other "
        "scripts",
    )
    max_new_tokens: int = Field(256, gt=0, description="length of the longest answer, in tokens")
    max_prompt_tokens: int = Field(
        256, gt=0, description="length of the longest prompt, in tokens; rows with a longer one are left out"
    )
    limit: int | None = Field(None, gt=0, description="use only the first rows of each data set; none: all")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the models run")
    num_bootstrap: int = Field(
        10_000, ge=100, description="bootstrap resamples behind each 95% interval and each p-value"
    )
    bootstrap_seed: int = Field(0, ge=0, description="seed of the bootstrap")
    max_num_seqs: int = Field(64, gt=0, description="number of answers generated at once")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="data type of the models' weights")

    @field_validator("model", "data", "predictions", "run", mode="before")
    @classmethod
    def _named_paths(cls, value: Any, info: ValidationInfo) -> Any:
        pairs = [value] if isinstance(value, str) else value
        if info.field_name == "data" and isinstance(pairs, (list, tuple)):
            pairs = [f"{pair}={SET_PREFIX}{pair}" if pair in KNOWN_SETS else pair for pair in pairs]
        return named_values(pairs, "NAME=PATH", "student=runs/dpkd")

    @field_validator("field", mode="before")
    @classmethod
    def _named_fields(cls, value: Any) -> Any:
        return named_values(value, "NAME=FIELD", "instruction=question")

    @field_validator("field")
    @classmethod
    def _fields_are_known(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name not in ROW_FIELDS:
                raise ValueError(f"the name {name!r} is none of {', '.join(ROW_FIELDS)}")
        return value

    @field_validator("model", "data", "run")
    @classmethod
    def _names_are_plain(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            check_name(name)
        return value

    @field_validator("predictions")
    @classmethod
    def _predictions_are_plain(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        for key in value:
            name, colon, data = key.partition(":")
            check_name(name)
            if colon:
                check_name(data)
            if name in info.data.get("model", {}):
                raise ValueError(f"a model has the name {name!r} too")
        return value

    _several = field_validator("seeds", "buckets", mode="before")(split_commas)

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, value: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        if value is None:
            return None
        if not value:
            raise ValueError("there is no seed")
        if len(set(value)) != len(value):
            raise ValueError(f"a seed is given twice in {','.join(map(str, value))}")
        if info.data.get("temperature") == 0 and len(value) > 1:
            raise ValueError(f"temperature 0 gives one answer for all {len(value)} seeds; give one seed or none")
        return value

    @field_validator("buckets")
    @classmethod
    def _edges_rise(cls, value: tuple[Edge, ...]) -> tuple[Edge, ...]:
        if any(low >= high for low, high in pairwise(edge for edge in value if isinstance(edge, int))):
            raise ValueError(f"the edges {','.join(map(str, value))} do not rise strictly")
        return value

    @model_validator(mode="after")
    def _something_is_evaluated(self) -> Self:
        if not self.model and not self.predictions:
            raise UserError(
                "there is nothing to evaluate",
                found="neither a model nor predictions",
                where="the options",
                advice="Give --model NAME=DIR or --predictions NAME=FILE",
            )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The names in the report: the models, then the predictions."""
        given = dict.fromkeys(key.partition(":")[0] for key in self.predictions)
        return (*self.model, *given)

    def generations_dir(self) -> Path:
        """The directory of generated answers."""
        return self.generations or self.out / "generations"

    def resolved_seeds(self) -> tuple[int, ...]:
        """The seeds of the options; without any, the paper's five if sampling and the first of them if greedy."""
        if self.seeds is not None:
            return self.seeds
        return PAPER_SEEDS if self.temperature > 0 else PAPER_SEEDS[:1]

    def engine_options(self) -> EngineOptions:
        """Engine options for generating answers; no distributions are needed."""
        return EngineOptions(
            max_length=self.max_prompt_tokens + self.max_new_tokens,
            top_k=0,
            dtype=self.dtype,
            device=self.device,
            max_num_seqs=self.max_num_seqs,
        )


def check_name(name: str) -> None:
    """Raise `ValueError` for a name of a model, set or run that is not safe in a directory or a table."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"the name {name!r} must start with a letter or digit, then only those, '.', '_', '-'")
