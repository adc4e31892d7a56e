"""The cost of a cache or a round: its parts, and what a person reads about it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpkd.core.progress import duration
from dpkd.teacher_cache.engines.engine import ResolvedEngine


@dataclass(frozen=True)
class Phase:
    """A part of the job: one kind of rows through one engine.

    Attributes:
        start_s: seconds until the engine was ready; 0 where an earlier phase started it.
        seconds: for the rows, without the start.
        generated: response tokens that the phase decodes; 0 where it scores given ones.
        prompt_tokens: tokens of all prompts.
        num_bytes: size of the shards; 0 where they are not kept.
        relative_error: 95% interval of the tokens of a row, as a share.
    """

    label: str
    num_rows: int
    start_s: float
    seconds: float
    generated: float
    prompt_tokens: float
    num_bytes: float
    relative_error: float


@dataclass(frozen=True)
class CacheCost:
    """The cost of a whole job.

    Attributes:
        devices: GPUs that it takes, or machines without one.
        survey_s: seconds for reading and tokenising the data, measured in full.
        live_epoch_s: seconds of a live teacher for one epoch on these rows (a forward pass each, by transformers on one
            device); None where it was not measured, for `no_live_reason`.
        prices: of a million prompt tokens and of a million answered tokens, at an endpoint.
        teacher_bytes: memory of the teacher's weights, which a live teacher would take beside the student.
    """

    out: str
    engine: ResolvedEngine
    device: str
    devices: int
    num_skipped: int
    survey_s: float
    phases: list[Phase]
    live_epoch_s: float | None = None
    no_live_reason: str = ""
    teacher_bytes: int | None = None
    price_per_hour: float | None = None
    pilot_rows: int = 0
    prices: tuple[float | None, float | None] = (None, None)

    @property
    def num_rows(self) -> int:
        """Rows of the finished cache or round."""
        return sum(phase.num_rows for phase in self.phases if phase.num_bytes)

    @property
    def seconds(self) -> float:
        """Wall time of the job."""
        return self.survey_s + sum(phase.start_s + phase.seconds for phase in self.phases)

    @property
    def margin_s(self) -> float:
        """Half the width of the 95% interval of `seconds`, from the spread of the pilot's lengths."""
        return sum(phase.seconds * phase.relative_error for phase in self.phases)

    @property
    def num_bytes(self) -> float:
        """Size of the finished cache or round."""
        return sum(phase.num_bytes for phase in self.phases)

    @property
    def device_hours(self) -> float:
        """Hours of one device: wall time times `devices`."""
        return self.seconds * self.devices / 3600

    @property
    def price(self) -> float | None:
        """In the currency of the prices; None if none is given."""
        if self.price_per_hour is None and self.prices == (None, None):
            return None
        tokens = (sum(phase.prompt_tokens for phase in self.phases), sum(phase.generated for phase in self.phases))
        by_tokens = sum(count * (price or 0.0) / 1e6 for count, price in zip(tokens, self.prices, strict=True))
        return self.device_hours * (self.price_per_hour or 0.0) + by_tokens

    @property
    def live_runs(self) -> int | None:
        """After how many epochs of students a live teacher has cost as much time as this job."""
        return None if not self.live_epoch_s else max(math.ceil(self.seconds / self.live_epoch_s), 1)

    def text(self) -> str:
        """The cost in lines for the terminal."""
        generated = sum(phase.generated for phase in self.phases)
        prompts = sum(phase.prompt_tokens for phase in self.phases)
        skipped = f", {self.num_skipped} rows of the data are skipped" if self.num_skipped else ""
        units = {"cuda": "GPU hours", "server": "server hours", "endpoint": "hours of waiting"}
        unit = units.get(self.device, "hours of this machine")
        low, high = (duration(self.seconds + sign * self.margin_s) for sign in (-1, 1))
        lines = [
            f"estimate for {self.out}, from a pilot of {self.pilot_rows} rows ({self.engine} on {self.device}):",
            f"  rows      {self.num_rows:,}{skipped}",
            f"  tokens    {_thousands(generated)} generated, {_thousands(prompts)} of prompts",
            f"  time      {duration(self.seconds)} ({low} to {high}): {self.device_hours:.2g} {unit}",
            *(
                f"            {phase.label}: {duration(phase.seconds)}"
                + (f", after {duration(phase.start_s)} to start" if phase.start_s else "")
                for phase in self.phases
            ),
            f"  disk      {_bytes(self.num_bytes)}",
        ]
        if self.price is not None:
            lines.append(f"  price     {self.price:,.2f}")
        return "\n".join([*lines, *self._live_lines()])

    def _live_lines(self) -> list[str]:
        if self.live_epoch_s is None or self.live_runs is None:
            return [f"  live teacher: not measured, {self.no_live_reason}"]
        memory = "" if self.teacher_bytes is None else f" and {_bytes(self.teacher_bytes)} of memory for its weights"
        after = "1 student run" if self.live_runs == 1 else f"{self.live_runs:,} student runs"
        return [
            f"  live teacher in the training step: {duration(self.live_epoch_s)} an epoch{memory};",
            f"            the cache is cheaper after {after} of one epoch",
        ]


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value / 1e3:.0f} kB"


def _thousands(value: float) -> str:
    """Three significant digits: a count that was estimated."""
    return f"{float(f'{value:.3g}'):,.0f}"
