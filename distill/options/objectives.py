"""The objectives by name, and what each is made of."""

from __future__ import annotations

from typing import Any, Literal, get_args

PreferenceName = Literal["dpkd", "ipo", "cpo", "simpo", "dpop", "reference-free"]
DivergenceName = Literal["forward-kl", "reverse-kl", "jsd", "tvd", "akl", "skewed-forward-kl", "skewed-reverse-kl"]
ObjectiveName = Literal[PreferenceName, DivergenceName, "kd", "sft", "seqkd", "minillm"]
TermName = Literal["dpkd", "sft", "kd", "lm", "minillm"]

PREFERENCES: tuple[str, ...] = get_args(PreferenceName)
DIVERGENCES: tuple[str, ...] = get_args(DivergenceName)
#: forms of the preference that exist for a single position
TOKEN_PREFERENCES = ("dpkd", "ipo", "dpop", "reference-free")

#: What an objective is made of when no weight is given. `kd` is the paper's baseline, 0.5 CE + 0.5 H(p, q).
OBJECTIVE_TERMS: dict[str, dict[TermName, float]] = {
    **{name: {"dpkd": 1.0} for name in PREFERENCES},
    **{name: {"kd": 1.0} for name in DIVERGENCES},
    "kd": {"sft": 0.5, "kd": 0.5},
    "sft": {"sft": 1.0},
    "seqkd": {"sft": 1.0},
    "minillm": {"minillm": 1.0},
}

#: Options that stand for a published mix; an option that is given itself goes before its preset's value.
PRESETS: dict[str, dict[str, Any]] = {
    "released-code": {
        "objective": "dpkd", "level": "token", "student_samples": "forced", "beta": 0.1,
        "dpkd_weight": 0.5, "sft_weight": 0.5, "lm_weight": 0.5,
    },
    "paper": {
        "objective": "dpkd", "level": "sequence", "length_normalize": True,
        "dpkd_weight": 1.0, "sft_weight": 0.0, "lm_weight": 1.0,
    },
}  # fmt: skip
