"""Options of `dpkd eval`. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast, get_args

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from dpkd.core.prompts.templates import TemplateName
from dpkd.core.settings import DeviceName, LocalPath, Location, Settings, TemplateArguments, named_values, split_commas
from dpkd.evaluate.metrics.buckets import Edge, Statistic
from dpkd.evaluate.metrics.rouge import RougeTokenizer
from dpkd.evaluate.options.comparing import ComparingOptions
from dpkd.teacher_cache.engines.engine import EngineOptions, LocalEngineName

#: the seeds that the paper and MiniLLM average over
PAPER_SEEDS = (10, 20, 30, 40, 50)

#: evaluation sets by name, and their file in --data-dir: the first one that exists
KNOWN_SETS: dict[str, tuple[str, ...]] = {
    "dolly": ("dolly_eval.jsonl", "dolly.jsonl", "dolly/valid.jsonl"),
    "self-instruct": ("self_instruct_252.jsonl", "self_instruct.jsonl", "self-inst/valid.jsonl"),
    "s-ni": ("sni_11plus.jsonl", "sni.jsonl", "sinst/11_/valid.jsonl"),
    "vicuna": ("vicuna.jsonl", "vicuna/valid.jsonl"),
    "unni": ("unni_11plus.jsonl", "unni.jsonl", "uinst/11_/valid.jsonl"),
}
#: prefix of the name of a known set, whose file is in the data directory
SET_PREFIX = "set:"
ROW_FIELDS = ("instruction", "input", "output", "messages", "prompt", "id", "category")

# names become directories and table cells, so they keep to characters that are safe in both
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _known_set(pair: str) -> str:
    """`dolly` as `dolly=set:dolly`."""
    if pair in KNOWN_SETS:
        return f"{pair}={SET_PREFIX}{pair}"
    if "=" not in pair and (near := get_close_matches(pair, KNOWN_SETS, n=1)):
        raise ValueError(f"{pair!r} is not a known set; did you mean {near[0]}? Else give NAME=FILE")
    return pair


def _named_by_path(pair: str) -> str:
    """`runs/trained` as `trained=runs/trained`."""
    return pair if "=" in pair else f"{Path(pair).resolve().name}={pair}"


def _each(change: Callable[[str], str]) -> BeforeValidator:
    """`change` for each text of a repeatable option; a dict has names already."""

    def changed(value: Any) -> Any:
        pairs = [value] if isinstance(value, str) else value
        return [change(str(pair)) for pair in pairs] if isinstance(pairs, (list, tuple)) else value

    return BeforeValidator(changed)


def _named(form: str, example: str) -> BeforeValidator:
    return BeforeValidator(partial(named_values, form=form, example=example))


NamedPaths = Annotated[dict[str, str], _named("NAME=PATH", "student=runs/dpkd"), _each(_named_by_path)]
NamedFiles = Annotated[dict[str, str], _named("NAME=PATH", "ours=answers.jsonl")]
NamedSets = Annotated[NamedFiles, _each(_known_set)]
NamedFields = Annotated[dict[str, str], _named("NAME=FIELD", "instruction=question")]


def _as_edge(value: Any) -> Edge:
    if value in get_args(Statistic):
        return cast(Statistic, value)
    if str(value).isdecimal() and int(value) > 0:
        return int(value)
    raise ValueError(f"{value!r} is neither a length above 0 nor `median` or `mean`")


class InputOptions(Settings):
    """What to evaluate on which data, and where to write the report."""

    title: ClassVar[str] = "Models and data"

    model: NamedPaths = Field(
        {}, description="DIR or NAME=DIR: a checkpoint to evaluate and its name in the report; repeatable"
    )
    predictions: NamedFiles = Field(
        {},
        description="NAME=FILE.jsonl: existing answers to score, one `prediction` per line, in the order of the rows "
        "or by `example_id`; NAME:SET=FILE if there are several data sets; repeatable",
    )
    data: NamedSets = Field(
        min_length=1,
        description="NAME=FILE: rows with references (.jsonl, .json, .parquet or a datasets name); or only the name of "
        f"a set in --data-dir: {', '.join(KNOWN_SETS)}; repeatable",
    )
    out: LocalPath = Field(description="directory for the report, the scores and the answers")
    data_dir: LocalPath | None = Field(
        None, description="directory of data sets given by name; none: that of the environment variable DPKD_DATA"
    )
    field: NamedFields = Field(
        {},
        description=f"NAME=FIELD: field of the rows that holds the {', '.join(ROW_FIELDS[:-1])} or {ROW_FIELDS[-1]}; "
        "repeatable",
    )
    limit: int | None = Field(None, gt=0, description="use only the first N rows of each data set; none: all")
    generations: LocalPath | None = Field(
        None,
        description="directory of generated answers, to share them between evaluations with other metrics or buckets; "
        "none: OUT/generations",
    )
    run: NamedPaths = Field(
        {},
        description="NAME=DIR: a run of dpkd train whose curves to show; runs among the models are shown anyway; "
        "repeatable",
    )


class AnswerOptions(Settings):
    """How models answer."""

    title: ClassVar[str] = "Answers"

    template: TemplateName = Field("alpaca", description="prompt template; use the one of the training")
    template_arg: TemplateArguments = Field(
        {}, description="variable of the chat template, such as enable_thinking=false; repeatable"
    )
    turns: Literal["last", "all"] = Field(
        "last",
        description="questions of a conversation to answer: the last under the given turns, or all, each after the "
        "model's own earlier answers",
    )
    temperature: float = Field(1.0, ge=0.0, allow_inf_nan=False, description="sampling temperature; 0 is greedy")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="top-p (nucleus) of sampling")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="comma-separated seeds, one answer per row and seed; none: 10,20,30,40,50, or 10 if greedy"
    )
    max_new_tokens: int = Field(256, gt=0, description="longest answer, in tokens")
    max_prompt_tokens: int = Field(256, gt=0, description="skip rows with a longer prompt, in tokens")

    _several_seeds = field_validator("seeds", mode="before")(split_commas)

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


class MetricOptions(Settings):
    """What to measure."""

    title: ClassVar[str] = "Metrics"

    buckets: tuple[Annotated[int | Statistic, BeforeValidator(_as_edge)], ...] = Field(
        (30, 70),
        min_length=1,
        description="comma-separated edges of the length buckets: numbers, or `median` and `mean` of the set's "
        "references",
    )
    bucket_by: Literal["words", "tokens"] = Field(
        "words", description="unit of the lengths; tokens are those of the first model"
    )
    bucket_of: Literal["reference", "prediction"] = Field(
        "reference", description="text whose length decides: the reference or the answer"
    )
    rouge_tokenizer: RougeTokenizer = Field(
        "default",
        description="tokens of Rouge: stemmed words of a-z and 0-9 (default); whitespace and character suit other "
        "scripts",
    )
    perplexity: bool = Field(True, description="measure the perplexity of the references under each model")
    cache: Location | None = Field(
        None,
        description="teacher cache of the training: report prompts that are in it (contamination), and each model's "
        "divergence from the teacher; none: neither",
    )
    cache_rows: int = Field(
        256, ge=0, description="largest number of rows of --cache to measure divergences on; 0: measure none"
    )
    train_data: str | None = Field(
        None, description="rows that the models were trained on: report prompts that are among them; none: do not check"
    )

    _several_buckets = field_validator("buckets", mode="before")(split_commas)

    @field_validator("buckets")
    @classmethod
    def _edges_rise(cls, value: tuple[Edge, ...]) -> tuple[Edge, ...]:
        if any(low >= high for low, high in pairwise(edge for edge in value if isinstance(edge, int))):
            raise ValueError(f"the edges {','.join(map(str, value))} do not rise strictly")
        return value


class EvalEngineOptions(Settings):
    """What runs the models."""

    title: ClassVar[str] = "Engine"

    engine: LocalEngineName = Field("auto", description="engine that runs the models; auto: vLLM if it is installed")
    device: DeviceName = Field("auto", description="device of the models; auto: CUDA if it is available")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="number type of the weights")
    max_num_seqs: int = Field(64, gt=0, description="largest number of requests in a batch")


class EvalConfig(InputOptions, AnswerOptions, MetricOptions, ComparingOptions, EvalEngineOptions):
    """What `dpkd eval` measures, and how."""

    one_of: ClassVar[tuple[tuple[str, ...], ...]] = (("model", "predictions"),)
    example: ClassVar[str] = "dpkd eval --model student=run --data dolly=heldout.jsonl --out report"

    @field_validator("field")
    @classmethod
    def _fields_are_known(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name not in ROW_FIELDS:
                raise ValueError(f"the name {name!r} is not one of {', '.join(ROW_FIELDS)}")
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
                raise ValueError(f"the name {name!r} is also the name of a model")
        return value

    @model_validator(mode="after")
    def _rows_have_a_cache(self) -> Self:
        if self.cache is None and (unread := self.changed("cache_rows")):
            raise ValueError(f"{unread[0]} goes with --cache: nothing else reads it")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the report: the models, then the predictions."""
        return (*self.model, *self.prediction_files())

    def prediction_files(self) -> dict[str, dict[str, str]]:
        """The files of predictions by name and data set; one given without a set answers the first."""
        files: dict[str, dict[str, str]] = {}
        for key, file in self.predictions.items():
            name, _, data = key.partition(":")
            files.setdefault(name, {})[data or next(iter(self.data))] = file
        return files

    def generations_dir(self) -> Path:
        """The directory of generated answers."""
        return self.generations or self.out / "generations"

    def resolved_seeds(self) -> tuple[int, ...]:
        """The seeds that are given; else the paper's five when sampling, and the first of them when greedy."""
        if self.seeds is not None:
            return self.seeds
        return PAPER_SEEDS if self.temperature > 0 else PAPER_SEEDS[:1]

    def engine_options(self) -> EngineOptions:
        """Options of the engine: lengths and precision; no distributions."""
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
