"""The numbers that the paper (arXiv 2406.19774v2) prints, by table; None where it prints none."""

from __future__ import annotations

from typing import Literal

Family = Literal["gpt2-120m", "gpt2-340m", "opt-1.3b"]

#: where the numbers are from, for whoever reads a table of ours
SOURCE = "paper: arXiv 2406.19774v2"

_SETS = ("DollyEval", "SelfInst", "S-NI")
#: Table 1, Rouge-L by family, method and set; AKL has no number on SelfInst
_TABLE1: dict[Family, dict[str, tuple[float | None, ...]]] = {
    "gpt2-120m": {
        "Teacher": (27.6, 14.3, 27.6),
        "SFT": (23.3, 10.0, 16.3),
        "KD": (22.8, 10.8, 13.4),
        "SeqKD": (22.7, 10.1, 16.4),
        "MiniLLM": (24.6, 13.2, 25.3),
        "AKL": (23.9, None, 19.2),
        "DPKD": (24.6, 13.8, 25.4),
    },
    "gpt2-340m": {
        "Teacher": (27.6, 14.3, 27.6),
        "SFT": (25.5, 13.0, 25.1),
        "KD": (25.0, 12.0, 23.7),
        "SeqKD": (25.3, 12.6, 22.9),
        "MiniLLM": (25.4, 15.6, 27.4),
        "DPKD": (26.0, 14.3, 27.6),
    },
    "opt-1.3b": {
        "Teacher": (29.2, 18.4, 30.4),
        "SFT": (26.0, 11.4, 23.1),
        "KD": (25.4, 12.2, 21.9),
        "SeqKD": (26.1, 12.7, 21.4),
        "MiniLLM": (26.7, 14.8, 28.6),
        "DPKD": (27.2, 14.9, 28.7),
    },
}
#: Table 2, Rouge-L on DollyEval of GPT-2 120M by form of the preference
_TABLE2 = {"IPO": 18.78, "CPO": 24.31, "SimPO": 24.46, "DPKD": 24.62}
#: Table 3, GPT-2 120M on DollyEval: Rouge-L, least rKLD and largest reward on the first response token
_TABLE3 = {
    "DPKD": {"Rouge-L": 24.62, "rKLD min": 0.07, "reward max": 0.97},
    "without LM loss": {"Rouge-L": 23.47, "rKLD min": 0.24, "reward max": 0.93},
    "without length normalisation": {"Rouge-L": 22.79, "rKLD min": 0.23, "reward max": 0.90},
}
_BUCKETS = ("[0,30)", "[30,70)", "[70,inf)")
#: Table 4, exact match by length of the gold response
_TABLE4 = {"SeqKD": (5.15, 0.00, 0.00), "MiniLLM": (5.30, 0.93, 0.63), "DPKD": (5.57, 1.85, 0.63)}
#: Table 5 and Fig. 5, Rouge-L by length of the gold response
_TABLE5 = {
    "KD": (28.04, 21.65, 15.07),
    "SeqKD": (29.32, 24.67, 16.16),
    "SFT": (30.10, 25.28, 16.09),
    "DPKD": (30.98, 26.69, 17.26),
}
#: Fig. 2: how far rKLD and Rouge-L move between the copies with noise
FIG2_SPANS = {"rkld": 0.001, "rouge_l": 6.23}


def paper_values(table: str, family: Family) -> dict[str, dict[str, float | None]]:
    """Values of `table` (table1 to table5; fig5 is Table 5 drawn) by method and column.

    Tables 2 to 5 are of GPT-2 120M, so that another `family` has none there.
    """
    if table == "table1":
        return {method: dict(zip(_SETS, values, strict=True)) for method, values in _TABLE1[family].items()}
    if family != "gpt2-120m":
        return {}
    if table == "table2":
        return {method: {"DollyEval": value} for method, value in _TABLE2.items()}
    if table == "table3":
        return {method: dict(values) for method, values in _TABLE3.items()}
    by_bucket = {"table4": _TABLE4, "table5": _TABLE5, "fig5": _TABLE5}[table]
    return {method: dict(zip(_BUCKETS, values, strict=True)) for method, values in by_bucket.items()}
