"""The `[reproduce]` table of a recipe: which table or figure of the paper its steps lead to, and from which outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from dpkd.core.errors import UserError
from dpkd.core.settings import LocalPath, Settings, read_toml
from dpkd.pipelines.commands.options import ArtefactName
from dpkd.pipelines.recipe.steps import Step
from dpkd.pipelines.reproduce.paper_values import Family, paper_values

#: what each artefact is made from
_NEEDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("table1", "table2", "table4", "table5", "fig5"), ("report", "data", "rows")),
    "table3": ("report", "data", "rows", "runs"),
    "fig1": ("judge",),
    "fig2": ("report", "data", "noise"),
    "fig3": ("runs",),
    "fig4": ("runs",),
}
#: what the command of each source directory is
_MADE_BY = {"report": "eval", "judge": "judge", "noise": "add-noise"}


class ReproduceConfig(Settings):
    """What a recipe's artefact is made from: outputs of its steps, and the paper's numbers to show next to ours."""

    artefact: ArtefactName = Field(description="the table or figure")
    out: LocalPath = Field(description="directory of the artefact")
    paper: Family = Field("gpt2-120m", description="model family whose numbers in the paper to show next to ours")
    report: LocalPath | None = Field(None, description="the `out` of an eval step")
    judge: LocalPath | None = Field(None, description="the `out` of a judge step")
    noise: LocalPath | None = Field(None, description="the `out` of an add-noise step")
    data: dict[str, str] = Field({}, description="our data set -> the paper's")
    rows: dict[str, str] = Field({}, description="our model -> the paper's method")
    runs: dict[str, tuple[LocalPath, ...]] = Field(
        {}, description="our model -> the `out` of its train steps that are shown, in the order of training"
    )
    models: dict[str, str] = Field({}, description="checkpoint directory that must be there -> how to get it")
    assume: dict[str, int] = Field(
        {}, description="for the plan: rows of data, and parameters of models, that may not be here when it is made"
    )
    other_data: str | None = Field(
        None, description="what our data are where they are not the paper's, said beside its numbers"
    )

    @field_validator("runs", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: (run,) if isinstance(run, (str, Path)) else run for name, run in value.items()}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name in _NEEDS[self.artefact]:
            if not getattr(self, name):
                raise ValueError(f"{self.artefact} needs `{name}`")
        for name in {"report", "judge", "noise", "rows", "runs"} - set(_NEEDS[self.artefact]):
            if getattr(self, name):
                raise ValueError(f"{self.artefact} is not made from `{name}`")
        if self.artefact not in ("table1", "fig1", "fig3", "fig4") and len(self.data) != 1:
            raise ValueError(f"{self.artefact} is of one data set: name one in `data`")
        if self.rows:
            known = paper_values(self.artefact, self.paper)
            for model, method in self.rows.items():
                if known and method not in known and method != OURS_ALONE:
                    raise ValueError(
                        f"rows.{model}: the paper's {self.artefact} has no {method!r}, but {', '.join(known)}; "
                        f"give {OURS_ALONE!r} where it has no number"
                    )
        return self


#: in `rows`: a method that the paper's table does not have
OURS_ALONE = "none"


def read_reproduce(path: Path, steps: list[Step]) -> ReproduceConfig:
    """The `[reproduce]` of the recipe at `path`, whose `steps` make all that it names; raises `UserError` otherwise."""
    content = read_toml(path).get("reproduce")
    where = f"{path}, [reproduce]"
    if not isinstance(content, dict):
        raise UserError(
            "the recipe makes no table or figure",
            expected="[reproduce]",
            where=path,
            advice="Run it with `dpkd run`, or choose a recipe of the paper from `dpkd recipes`",
        )
    config = ReproduceConfig.parse(content, where=where)
    for name, command in _MADE_BY.items():
        if (place := getattr(config, name)) is not None:
            _step_of(steps, command, place, f"{name} of {where}")
    for name, runs in config.runs.items():
        for run in runs:
            step = _step_of(steps, "train", run, f"runs.{name} of {where}")
            if step.config.validation_examples == 0:  # type: ignore[attr-defined]
                raise UserError(
                    "the run is not validated, so it has nothing to show",
                    found="validation_examples 0",
                    where=f"{path}, {run}",
                    advice="Leave validation_examples out of its train step",
                )
    if config.report is not None:
        _check_report(config, _step_of(steps, "eval", config.report, where).config, steps, where)
    return config


def _step_of(steps: list[Step], command: str, out: Path, where: str) -> Step:
    for step in steps:
        if step.command == command and Path(step.config.out) == out:  # type: ignore[attr-defined]
            return step
    outs = ", ".join(str(step.config.out) for step in steps if step.command == command)  # type: ignore[attr-defined]
    raise UserError(f"no {command} step writes it", found=out, expected=outs or f"a {command} step", where=where)


def _check_report(config: ReproduceConfig, evaluation: Any, steps: list[Step], where: str) -> None:
    """Every model and set that is named is evaluated."""
    for what, ours, theirs in (("data", config.data, evaluation.data), ("rows", config.rows, evaluation.names)):
        for name in ours:
            if name not in theirs:
                raise UserError(
                    "the eval step has no such name",
                    found=repr(name),
                    expected=", ".join(theirs),
                    where=f"{what} of {where}",
                )
    if config.artefact in ("table4", "table5", "fig5") and (
        evaluation.buckets != (30, 70) or evaluation.bucket_by != "words" or evaluation.bucket_of != "reference"
    ):
        raise UserError(
            "the eval step's buckets are not the paper's",
            expected="buckets 30,70 by words of the reference",
            where=where,
        )
    if config.noise is not None:
        noise: Any = _step_of(steps, "add-noise", config.noise, where).config
        for directory in noise.copies().values():
            if str(directory) not in evaluation.model.values():
                raise UserError(
                    "a copy with noise is not evaluated",
                    found=directory,
                    expected=", ".join(evaluation.model.values()),
                    where=where,
                    advice="Name it in the [steps.model] of the eval step",
                )
