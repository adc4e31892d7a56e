"""The objectives by name, and the terms that each one weighs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from dpkd.distill.losses.divergence import DIVERGENCES
from dpkd.distill.losses.preference import PREFERENCES

TermName = Literal["dpkd", "sft", "kd", "lm", "minillm"]
#: preferences that are defined for a single position
TOKEN_PREFERENCES = tuple(name for name, levels in PREFERENCES.items() if "token" in levels)

#: Weights of an objective's terms where the options give none. `kd` is the paper's baseline, 0.5 CE + 0.5 H(p, q).
OBJECTIVE_TERMS: dict[str, dict[TermName, float]] = {
    **{name: {"dpkd": 1.0} for name in PREFERENCES},
    **{name: {"kd": 1.0} for name in DIVERGENCES},
    "kd": {"sft": 0.5, "kd": 0.5},
    "sft": {"sft": 1.0},
    "seqkd": {"sft": 1.0},
    "distillm2": {"kd": 1.0},
    "minillm": {"minillm": 1.0},
}

#: Options by name. Options that are given override the preset's. `recommended` follows docs/results/objectives.md.
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {
        "objective": "skewed-forward-kl", "skew_alpha": 0.1, "level": "token", "tail": "bucket",
        "responses": "teacher",
    },
    "released-code": {
        "objective": "dpkd", "level": "token", "token_pairs": "argmax", "student_samples": "forced", "beta": 0.1,
        "label_smoothing": 0.0, "dpkd_weight": 0.5, "sft_weight": 0.5, "kd_weight": 0.0, "lm_weight": 0.5,
        "responses": "all", "dropout": True, "best_metric": "last",
    },
    "paper": {
        "objective": "dpkd", "level": "sequence", "length_normalize": True, "beta": 1.0, "label_smoothing": 0.0,
        "dpkd_weight": 1.0, "sft_weight": 0.0, "kd_weight": 0.0, "lm_weight": 1.0, "responses": "teacher",
        "best_metric": "last",
    },
}  # fmt: skip

if TYPE_CHECKING:
    ObjectiveName = str
    PresetName = str
else:
    ObjectiveName = Literal[tuple(OBJECTIVE_TERMS)]
    PresetName = Literal[tuple(PRESETS)]
