"""Options of the commands that live in this package. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator

from dpkd.core.settings import DeviceName, LocalPath, Location, Settings, named_values, split_commas

ArtefactName = Literal["table1", "table2", "table3", "table4", "table5", "fig1", "fig2", "fig3", "fig4", "fig5"]
ARTEFACTS: tuple[str, ...] = get_args(ArtefactName)


class PrepareConfig(Settings):
    """Which rows of instruction data to keep, and in which form."""

    example: ClassVar[str] = "dpkd prepare-data --data train.jsonl --out kept.jsonl --min-response-words 11"

    data: LocalPath = Field(description="instruction data, .jsonl")
    out: LocalPath = Field(description="file to write, .jsonl")
    min_response_words: int = Field(
        1,
        ge=0,
        description="shortest reference response to keep, in words; 0 keeps rows without one too; the paper keeps 11 "
        "and more",
    )
    part: str = Field(
        "1/1", pattern=r"^[1-9]\d*/[1-9]\d*$", description="K/N: take only every Nth row of the data, from row K on"
    )
    limit: int | None = Field(None, ge=1, description="keep only the first N of those rows; none: all")
    form: Literal["rows", "text"] = Field(
        "rows", description="write whole rows, or only their responses as a corpus for dpkd train --lm-data (text)"
    )

    @field_validator("part")
    @classmethod
    def _part_is_one_of_n(cls, value: str) -> str:
        number, parts = map(int, value.split("/"))
        if number > parts:
            raise ValueError(f"there is no part {number} of {parts}: give K/N with K from 1 to N")
        return value


class NoiseConfig(Settings):
    """Copies of a model with Gaussian noise on its weights, and how far each is from a cache's teacher (Fig. 2)."""

    example: ClassVar[str] = "dpkd add-noise --model student --cache cache --out noise"

    model: str = Field(description="model to copy: a checkpoint directory or a hub name")
    cache: Location = Field(description="directory or URL of the teacher cache to measure the copies on")
    out: LocalPath = Field(description="directory for the copies and noise.json")
    scales: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (0.01, 0.02, 0.05, 0.1),
        min_length=1,
        description="comma-separated standard deviations of the noise, relative to each weight matrix's root mean "
        "square",
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 1, 2), min_length=1, description="comma-separated seeds; one copy per scale and seed"
    )
    cache_rows: int = Field(256, ge=1, description="largest number of rows of --cache to measure a copy on")
    beta: float = Field(0.1, gt=0, description="beta of the implicit reward")
    device: DeviceName = Field("auto", description="device to measure on; auto: CUDA if it is available")

    _several = field_validator("scales", "seeds", mode="before")(split_commas)

    @field_validator("scales", "seeds")
    @classmethod
    def _differ(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"a value is given twice in {','.join(map(str, value))}")
        return value

    def copies(self) -> dict[tuple[float, int], Path]:
        """Directory of each (scale, seed), in order; scale 0 needs one copy, whatever the seeds."""
        seeds = {scale: self.seeds if scale else self.seeds[:1] for scale in self.scales}
        return {
            (scale, seed): self.out / f"scale-{scale:g}-seed-{seed}" for scale in self.scales for seed in seeds[scale]
        }


class RecipeChoice(Settings):
    """Which recipe, with which inputs."""

    from_files: ClassVar[bool] = False

    recipe: str = Field(
        description="a name that dpkd recipes lists, or a TOML file", json_schema_extra={"positional": "RECIPE"}
    )
    set: dict[str, str] = Field({}, description="NAME=VALUE: replace a value of the recipe's [inputs]; repeatable")

    @field_validator("set", mode="before")
    @classmethod
    def _named_inputs(cls, value: Any) -> Any:
        return named_values(value, "NAME=VALUE", "teacher=DIR")


class DryRunOptions(Settings):
    """Whether to run the recipe or to print it."""

    dry_run: bool = Field(False, description="print the steps with their options and stop")


class PilotOptions(Settings):
    """How many rows to try, and the price of a machine."""

    pilot_rows: int = Field(32, ge=4, description="rows of each pilot of a model that answers")
    price_per_hour: float | None = Field(
        None, ge=0, description="price of an hour of a GPU, or of this machine; none: unknown"
    )


class RunOptions(RecipeChoice, DryRunOptions):
    """Which recipe to run, with which inputs."""

    example: ClassVar[str] = "dpkd run quickstart --dry-run"


class PlanOptions(RecipeChoice, PilotOptions):
    """Which recipe to plan, and how many rows to try."""

    example: ClassVar[str] = "dpkd plan quickstart"


class RecipesOptions(Settings):
    """Which shipped recipe to print."""

    example: ClassVar[str] = "dpkd recipes quickstart"

    recipe: str | None = Field(
        None, description="recipe to print as TOML; none: list all", json_schema_extra={"positional": "[RECIPE]"}
    )


class ReproduceOptions(Settings):
    """Which table or figure to make, from which recipe."""

    example: ClassVar[str] = "dpkd reproduce table1 --recipe paper/table1-tiny --dry-run"
    from_files: ClassVar[bool] = False

    artefact: ArtefactName = Field(description="table or figure to make", json_schema_extra={"positional": "ARTEFACT"})
    recipe: str | None = Field(
        None, description="a recipe that dpkd recipes lists under paper/, or a TOML file; none: list those that make it"
    )
    dry_run: bool = Field(False, description="print the steps with their cost and stop")
