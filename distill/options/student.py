"""Options of `dpkd init-student`. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from dpkd.core.settings import DeviceName, Location, Settings


class InitStudentConfig(Settings):
    """How to make a student: from the teacher's layers and neurons, with random weights, or as a copy."""

    example: ClassVar[str] = "dpkd init-student --teacher teacher --out student --layers 8"

    teacher: str = Field(description="teacher: a checkpoint directory or a hub name")
    out: Path = Field(description="directory of the student")
    layers: int | None = Field(
        None, ge=1, description="number of the teacher's layers to keep; none: all, or as many as --keep lists"
    )
    keep: Literal["spread", "first", "last"] | tuple[Annotated[int, Field(ge=0)], ...] = Field(
        "last",
        description="which layers to keep: the last ones (the best start, docs/results/students.md), the first ones, "
        "evenly spread ones, or comma-separated numbers from 0",
    )
    mlp_width: int | None = Field(
        None,
        ge=1,
        description="number of neurons to keep in each MLP, by activation on --cache; none: all",
    )
    from_config: Path | None = Field(
        None, description="make a student with random weights from this config.json of transformers; none: do not"
    )
    from_checkpoint: str | None = Field(
        None,
        description="copy this checkpoint (directory or hub name); it must have the teacher's tokenizer; none: do not",
        json_schema_extra={"flag": "from"},
    )
    cache: Location | None = Field(
        None, description="teacher cache to choose neurons on and to measure the new student on; none: no measurement"
    )
    cache_rows: int = Field(64, ge=1, description="largest number of rows of --cache to read")
    seed: int = Field(0, ge=0, description="seed of the random weights of --from-config")
    device: DeviceName = Field("auto", description="device to measure on; auto: CUDA if it is available")

    @field_validator("keep", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
        if value in ("spread", "first", "last"):
            return value
        if (
            not isinstance(parts, (list, tuple))
            or not parts
            or not all(str(part).strip().isdecimal() for part in parts)
        ):
            raise ValueError(f"{value!r} is neither spread, first, last nor a list of layers from 0, such as 0,3,7")
        return tuple(int(part) for part in parts)

    @model_validator(mode="after")
    def _fits_together(self) -> InitStudentConfig:
        listed = self.keep if isinstance(self.keep, tuple) else None
        prunes = [
            flag
            for flag, given in (
                ("--layers", self.layers is not None),
                (f"--keep {self._keep_text}", self.keep != type(self).model_fields["keep"].default),
                ("--mlp-width", self.mlp_width is not None),
            )
            if given
        ]
        whole = [
            flag
            for flag, given in (("--from-config", self.from_config), ("--from", self.from_checkpoint))
            if given is not None
        ]
        if len(whole) == 2:
            raise ValueError("give --from-config or --from, not both")
        if whole and prunes:
            raise ValueError(f"{prunes[0]} selects the teacher's weights and does not go with {whole[0]}")
        if not whole and not prunes:
            raise ValueError(
                "say what the student is: --layers N, --mlp-width N, --from-config FILE or --from CHECKPOINT"
            )
        if listed is not None and list(listed) != sorted(set(listed)):
            raise ValueError(f"--keep {self._keep_text} must list layers in ascending order, each once")
        if listed is not None and self.layers not in (None, len(listed)):
            raise ValueError(f"--keep {self._keep_text} lists {len(listed)} layers, but --layers says {self.layers}")
        if listed is None and self.layers is None and f"--keep {self._keep_text}" in prunes:
            raise ValueError(f"--keep {self._keep_text} needs --layers N")
        if self.mlp_width is not None and self.cache is None:
            raise ValueError("--mlp-width needs --cache, on whose rows the neurons' activations are measured")
        if self.seed and self.from_config is None:
            raise ValueError("--seed goes with --from-config: nothing else is random")
        return self

    @property
    def _keep_text(self) -> str:
        return ",".join(map(str, self.keep)) if isinstance(self.keep, tuple) else self.keep
