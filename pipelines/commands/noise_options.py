"""Options of `dpkd add-noise`. Imports nothing heavy: the command line reads it for `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from dpkd.core.settings import Location, Settings, split_commas


class NoiseConfig(Settings):
    """Copies of a model with Gaussian noise on its weights, and how far each is from a cache's teacher (Fig. 2)."""

    model: str = Field(description="model that is copied: a checkpoint directory or a hub name")
    cache: Location = Field(description="teacher cache on whose rows the copies are measured; a path or URL")
    out: Path = Field(description="directory of the copies and of noise.json")
    scales: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (0.01, 0.02, 0.05, 0.1),
        min_length=1,
        description="comma-separated standard deviations of the noise, as shares of each weight matrix's root mean "
        "square",
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 1, 2), min_length=1, description="comma-separated seeds: a copy for each scale and seed"
    )
    cache_rows: int = Field(256, ge=1, description="rows of the cache that each copy is measured on, at most")
    beta: float = Field(0.1, gt=0, description="beta of the implicit reward")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device to measure on")

    _several = field_validator("scales", "seeds", mode="before")(split_commas)

    @field_validator("scales", "seeds")
    @classmethod
    def _differ(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"one is given twice in {','.join(map(str, value))}")
        return value

    def copies(self) -> dict[tuple[float, int], Path]:
        """Where the copy of each (scale, seed) stands, in order; scale 0 is one copy, whatever the seeds."""
        seeds = {scale: self.seeds if scale else self.seeds[:1] for scale in self.scales}
        return {
            (scale, seed): self.out / f"scale-{scale:g}-seed-{seed}" for scale in self.scales for seed in seeds[scale]
        }
