"""Options of `dpkd init-student`. Imports nothing heavy: the command line reads it for `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dpkd.core.settings import Location, Settings


class InitStudentConfig(Settings):
    """How to make a student: of the teacher's layers and neurons, with random weights, or from another checkpoint."""

    teacher: str = Field(description="teacher: a checkpoint directory or a hub name")
    out: Path = Field(description="directory of the student")
    layers: int | None = Field(
        None, ge=1, description="layers of the teacher to keep; none: all, or as many as --keep lists"
    )
    keep: Literal["spread", "first", "last"] | tuple[Annotated[int, Field(ge=0)], ...] = Field(
        "last",
        description="which layers: the last (they start and recover best, docs/results/students.md), the first, "
        "spread evenly from the first to the last, or comma-separated numbers from 0",
    )
    mlp_width: int | None = Field(
        None,
        ge=1,
        description="neurons to keep in every MLP, those with the largest activations on --cache; none: all",
    )
    from_config: Path | None = Field(
        None, description="a student with random weights of this config.json of transformers"
    )
    from_checkpoint: str | None = Field(
        None,
        description="a copy of this checkpoint (directory or hub name), which must have the teacher's tokenizer",
        json_schema_extra={"flag": "from"},
    )
    cache: Location | None = Field(
        None, description="teacher cache on which neurons are chosen and the new student is measured; a path or URL"
    )
    cache_rows: int = Field(64, ge=1, description="rows of the cache that are read, at most")
    seed: int = Field(0, ge=0, description="seed of --from-config's random weights")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device to measure on")

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
            raise ValueError(f"{prunes[0]} is about the teacher's weights and does not go with {whole[0]}")
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
