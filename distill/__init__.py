"""Learn from the cached teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpkd.core.lazy import lazy_exports

if TYPE_CHECKING:
    from dpkd.distill.options.student import InitStudentConfig as InitStudentConfig
    from dpkd.distill.options.train import TrainConfig as TrainConfig
    from dpkd.distill.student.init import init_student as init_student
    from dpkd.distill.training import train as train

__getattr__ = lazy_exports(
    __name__,
    {
        "train": "dpkd.distill.training",
        "TrainConfig": "dpkd.distill.options.train",
        "init_student": "dpkd.distill.student.init",
        "InitStudentConfig": "dpkd.distill.options.student",
    },
)
