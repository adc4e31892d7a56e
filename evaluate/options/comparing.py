"""Options of `dpkd eval` and `dpkd report` about comparing models. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from dpkd.core.errors import UserError
from dpkd.core.settings import Settings


class ComparingOptions(Settings):
    """Which models are compared, and the p-values."""

    title: ClassVar[str] = "Comparisons"

    baseline: str | None = Field(
        None, description="compare every other model with this one alone; none: compare all pairs", min_length=1
    )
    teacher_name: str | None = Field(
        None,
        description="model of which the report shows what share the others reach; none: the one named teacher, if any",
        min_length=1,
    )
    num_sign_flips: int = Field(
        10_000,
        ge=100,
        description="random sign flips per p-value, at least 40 per comparison of a set; all are counted if at most 16 "
        "rows differ",
    )
    sign_flip_seed: int = Field(0, ge=0, description="seed of the sign flips")

    def roles(self, names: Sequence[str]) -> dict[str, str | None]:
        """The names of the `teacher` and the `baseline` among the evaluated `names`; `UserError` for an unknown one."""
        for name, key in ((self.teacher_name, "teacher_name"), (self.baseline, "baseline")):
            if name is not None and name not in names:
                raise UserError(
                    "no evaluated model has this name",
                    found=repr(name),
                    expected=" or ".join(names),
                    where=self.flag(key),
                    advice="Give a name of --model or --predictions",
                )
        teacher = self.teacher_name or ("teacher" if "teacher" in names and self.baseline != "teacher" else None)
        return {"teacher": teacher, "baseline": self.baseline}
