"""Options of `dpkd init-student`. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from dpkd.core.prompts.templates import TemplateName
from dpkd.core.settings import DeviceName, LocalPath, Location, Settings, TemplateArguments


class InitStudentConfig(Settings):
    """How to make a student: from the teacher's layers and neurons, with random weights, or as a copy."""

    example: ClassVar[str] = "dpkd init-student --teacher teacher --cache cache --out student --layers 20"

    teacher: str = Field(description="teacher: a checkpoint directory or a hub name")
    out: LocalPath = Field(description="directory of the student")
    params: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the teacher's parameters to keep, such as 0.6, embeddings included; --layers and "
        "--mlp-width are chosen to fit unless one is given; none: as many as --layers, --mlp-width and --heads leave",
    )
    layers: int | None = Field(
        None,
        ge=1,
        description="number of the teacher's layers to keep; none: all, or as many as --keep lists or --params allows",
    )
    keep: Literal["importance", "spread", "first", "last"] | tuple[Annotated[int, Field(ge=0)], ...] = Field(
        "importance",
        description="which layers to keep: those that the teacher needs most on rows of --cache or --data (the "
        "nearest start, docs/results/students.md), evenly spread ones, the first ones, the last ones, or "
        "comma-separated numbers from 0",
    )
    mlp_width: int | None = Field(
        None, ge=1, description="number of neurons to keep in each MLP, by activation; none: all, or as --params allows"
    )
    heads: int | None = Field(
        None,
        ge=1,
        description="number of attention heads to keep in each layer, by activation; heads that share keys and values "
        "stay together; none: all",
    )
    from_config: LocalPath | None = Field(
        None, description="make a student with random weights from this config.json of transformers; none: do not"
    )
    from_checkpoint: str | None = Field(
        None,
        description="copy this checkpoint (directory or hub name); it must have the teacher's tokenizer; none: do not",
        json_schema_extra={"flag": "from"},
    )
    eos_from_teacher: bool = Field(
        False,
        description="with --from: a checkpoint whose tokenizer differs from the teacher's in its EOS alone takes the "
        "teacher's EOS",
    )
    cache: Location | None = Field(
        None,
        description="teacher cache whose rows to choose on and to measure the student on; none: --data, or no rows",
    )
    data: str | None = Field(
        None,
        description="where no cache exists: rows to choose and measure on, references included where they have any "
        "(a .json, .jsonl or .parquet file, or a name of the datasets library); none: --cache, or no rows",
    )
    template: TemplateName | None = Field(None, description="prompt template for --data; none: a cache has its own")
    template_arg: TemplateArguments = Field(
        {}, description="with --data: variable of the chat template, such as enable_thinking=false; repeatable"
    )
    cache_rows: int = Field(
        64,
        ge=2,
        description="largest number of rows of --cache or --data: a quarter to choose on, the others to measure on",
    )
    seed: int = Field(0, ge=0, description="seed of the random weights of --from-config")
    device: DeviceName = Field("auto", description="device to choose and measure on; auto: CUDA if it is available")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="number type of the teacher while its weights are chosen, and of the student's files; bfloat16 "
        "halves the memory and rounds the KL that layers are chosen by",
    )

    @field_validator("keep", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
        if value in ("importance", "spread", "first", "last"):
            return value
        is_list = isinstance(parts, (list, tuple)) and bool(parts)
        if not is_list or not all(str(part).strip().isdecimal() for part in parts):
            raise ValueError(
                f"{value!r} is neither importance, spread, first, last nor a list of layers from 0, such as 0,3,7"
            )
        return tuple(int(part) for part in parts)

    @model_validator(mode="after")
    def _fits_together(self) -> InitStudentConfig:
        listed = self.keep if isinstance(self.keep, tuple) else None
        sizes, named = self.changed("params", "layers", "mlp_width", "heads"), bool(self.changed("keep"))
        prunes = [*sizes, *([f"--keep {self._keep_text}"] if named else [])]
        wholes = {"--from-config": self.from_config, "--from": self.from_checkpoint}
        whole = [flag for flag, given in wholes.items() if given is not None]
        if self.eos_from_teacher and self.from_checkpoint is None:
            raise ValueError("--eos-from-teacher goes with --from: other students have the teacher's EOS")
        if len(whole) == 2:
            raise ValueError("give --from-config or --from, not both")
        if whole and prunes:
            raise ValueError(f"{prunes[0]} selects the teacher's weights and does not go with {whole[0]}")
        if not whole and not prunes:
            raise ValueError(
                "say what the student is: --params SHARE, --layers N, --mlp-width N, --heads N, --from-config FILE or "
                "--from CHECKPOINT"
            )
        if listed is not None and list(listed) != sorted(set(listed)):
            raise ValueError(f"--keep {self._keep_text} must list layers in ascending order, each once")
        if listed is not None and self.layers not in (None, len(listed)):
            raise ValueError(f"--keep {self._keep_text} lists {len(listed)} layers, but --layers says {self.layers}")
        if named and listed is None and self.layers is None:
            raise ValueError(f"--keep {self._keep_text} needs --layers N")
        if self.params is not None and self.mlp_width is not None and (self.layers is not None or listed is not None):
            raise ValueError(
                "--params chooses layers or neurons, but both are given: leave out --params or --mlp-width"
            )
        if self.cache is not None and self.data is not None:
            raise ValueError("give --cache or --data, not both")
        if (self.data is None) != (self.template is None):
            raise ValueError("--data and --template go together; a cache has its own template")
        if self.template_arg and self.data is None:
            raise ValueError("--template-arg goes with --data; a cache has its own template and arguments")
        if self.needs_rows and self.cache is None and self.data is None:
            chooser = "--keep importance (the default)" if self.chooses_layers else sizes[-1]
            raise ValueError(
                f"{chooser} chooses on rows: give --cache CACHE, or --data FILE --template NAME; without rows, "
                "give --layers N and --keep spread"
            )
        if self.cache is None and self.data is None and (unread := self.changed("cache_rows")):
            raise ValueError(f"{unread[0]} goes with --cache or --data: nothing else has rows to read")
        if whole and self.changed("dtype"):
            raise ValueError(f"--dtype is that of the teacher's weights and does not go with {whole[0]}")
        if self.seed and self.from_config is None:
            raise ValueError("--seed goes with --from-config: nothing else is random")
        return self

    @property
    def chooses_layers(self) -> bool:
        """Whether the layers are chosen by importance."""
        return self.keep == "importance" and (self.layers is not None or self.params is not None)

    @property
    def needs_rows(self) -> bool:
        """Whether weights are chosen by what they do on rows."""
        widths = (self.params, self.mlp_width, self.heads)
        return self.chooses_layers or any(size is not None for size in widths)

    @property
    def _keep_text(self) -> str:
        return ",".join(map(str, self.keep)) if isinstance(self.keep, tuple) else self.keep
