"""The paper's tables with our numbers, and the paper's own next to them, marked as such."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.files import write_json, write_text
from dpkd.core.markdown import markdown_table
from dpkd.evaluate.metrics.buckets import Bucket
from dpkd.evaluate.report.cells import difference_of, interval_cell
from dpkd.pipelines.reproduce.options import OURS_ALONE, ReproduceConfig
from dpkd.pipelines.reproduce.paper_values import SOURCE, paper_values
from dpkd.pipelines.reproduce.sources import read_json, read_validations

_TITLES = {
    "table1": "Table 1: Rouge-L of teacher, baselines and DPKD",
    "table2": "Table 2: Rouge-L by form of the preference",
    "table3": "Table 3: ablation of the language-model loss and of length normalisation",
    "table4": "Table 4: exact match by length of the gold response in words",
    "table5": "Table 5: Rouge-L by length of the gold response in words",
    "fig5": "Fig. 5: Rouge-L by length of the gold response in words",
}
_FAMILIES = {
    "gpt2-120m": "GPT-2 120M from 1.5B",
    "gpt2-340m": "GPT-2 340M from 1.5B",
    "opt-1.3b": "OPT 1.3B from 13B",
}


def build_table(config: ReproduceConfig, made: dict[str, Any]) -> dict[str, Any]:
    """The table (or the numbers of Fig. 5) that `config` names, as it is in its JSON file.

    `rows` have our `model`, the `paper_method` (None: the paper has no such row) and `columns`: by our name of the
    column `ours` (`mean`, and `low` and `high` of the 95% interval or None), `seeds`, `paper_column` and `paper` (None:
    no number). `differences` are paired by row, of DPKD less SFT (less every other method in tables without SFT), with
    the paper's own. Raises `UserError` when the output of a step is missing.
    """
    assert config.report is not None
    report = read_json(config.report / "report.json")
    theirs = paper_values(config.artefact, config.paper)
    rows = [
        {
            "model": model,
            "paper_method": None if method == OURS_ALONE else method,
            "columns": _columns(config, report, model, theirs.get(method, {})),
        }
        for model, method in config.rows.items()
    ]
    return {
        "artefact": config.artefact,
        "title": _TITLES[config.artefact],
        "rows": rows,
        "differences": _differences(config, report, rows),
        "notes": _notes(config, bool(theirs)),
        "paper": SOURCE,
        **made,
    }


def _columns(
    config: ReproduceConfig, report: dict[str, Any], model: str, theirs: dict[str, float | None]
) -> dict[str, dict[str, Any]]:
    of_sets = report["models"][model]["data"]
    if config.artefact in ("table1", "table2"):
        return {ours: _scores(of_sets[ours], "rouge_l", of, theirs) for ours, of in config.data.items()}
    summary = of_sets[next(iter(config.data))]
    if config.artefact in ("table4", "table5", "fig5"):
        metric = "exact_match" if config.artefact == "table4" else "rouge_l"
        labels = [Bucket(part["low"], part["high"]).label for part in summary["buckets"]]
        return {
            f"{label} (n={part['n']})": _scores(part, metric, label, theirs)
            for label, part in zip(labels, summary["buckets"], strict=True)
        }
    if model not in config.runs:
        raise UserError("a row of table3 has no run", found=repr(model), expected="runs." + model, where="[reproduce]")
    lines = read_validations(config.runs[model])
    best = {
        "rKLD min": min(line["rkld_first"] for line in lines),
        "reward max": max(line["reward_chosen"] for line in lines),
    }
    return {"Rouge-L": _scores(summary, "rouge_l", "Rouge-L", theirs)} | {
        name: _cell({"mean": value, "low": None, "high": None}, [], name, theirs) for name, value in best.items()
    }


def _differences(config: ReproduceConfig, report: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    others = [row for row in rows if row["paper_method"] not in (None, "DPKD", "Teacher")]
    others = [row for row in others if row["paper_method"] == "SFT"] or others
    found = []
    for ours in (row for row in rows if row["paper_method"] == "DPKD"):
        for other in others:
            columns = {
                column: {
                    "ours": _paired(config, report, ours["model"], other["model"], place, column),
                    "paper": None if None in (papers := [row["columns"][column]["paper"] for row in (ours, other)])
                    else round(papers[0] - papers[1], 2),
                }
                for place, column in enumerate(ours["columns"])
                if ours["columns"][column]["ours"]["low"] is not None
            }  # fmt: skip
            found.append({"model": ours["model"], "baseline": other["model"], "columns": columns})
    return found


def _paired(
    config: ReproduceConfig, report: dict[str, Any], model: str, baseline: str, place: int, column: str
) -> dict[str, Any]:
    """The difference of two models in one column: in a set, or in a length bucket of the first set."""
    by_bucket = config.artefact in ("table4", "table5", "fig5")
    data = column if config.artefact in ("table1", "table2") else next(iter(config.data))
    metric = "exact_match" if config.artefact == "table4" else "rouge_l"
    found = difference_of(report, data, model, baseline, metric, place if by_bucket else None)
    return {key: None if found is None else found[key] for key in ("mean", "low", "high", "p_value")}


def _scores(summary: dict[str, Any], metric: str, of: str, theirs: dict[str, float | None]) -> dict[str, Any]:
    seeds = [{"seed": seed["seed"], "mean": seed[metric]} for seed in summary["seeds"]]
    return _cell({key: summary[metric][key] for key in ("mean", "low", "high")}, seeds, of, theirs)


def _cell(ours: dict[str, Any], seeds: list[Any], of: str, theirs: dict[str, float | None]) -> dict[str, Any]:
    return {"ours": ours, "seeds": seeds, "paper_column": of, "paper": theirs.get(of)}


def _notes(config: ReproduceConfig, has_paper: bool) -> list[str]:
    as_bars = config.artefact == "fig5"
    ours, theirs = ("Bars", "Diamonds") if as_bars else ("Ours", "Columns marked paper")
    where = "as lines" if as_bars else "in brackets"
    notes = [f"{ours}: mean over seeds and, {where}, the 95% interval over rows; from 0 to 100."]
    if has_paper:
        notes.append(f"{theirs} are the paper's numbers ({SOURCE}, {_FAMILIES[config.paper]}), not ours.")
    if config.other_data:
        notes.append(f"Our data are {config.other_data}: the two numbers cannot be compared.")
    if config.artefact == "table3":
        notes.append(
            "rKLD min is the smallest KL(student, teacher) in nats on the first response token, reward max the largest "
            "mean beta log q/p of the teacher's responses (divided by their length where the loss is), over the "
            "validations of the run."
        )
        notes.append(
            "The paper's reward max is not comparable: the mean of Eq. 29 over the teacher's responses is -beta "
            "KL(teacher, student), never above 0, and the paper reports up to 0.97 without saying of which responses."
        )
    return notes


def write_table(table: dict[str, Any], out: Path) -> list[Path]:
    """Write `table` to OUT/NAME.md, .csv and .json; the paths."""
    paths = [out / f"{table['artefact']}.{kind}" for kind in ("md", "csv", "json")]
    write_text(paths[0], to_markdown(table))
    write_text(paths[1], _to_csv(table))
    write_json(paths[2], table)
    return paths


def to_markdown(table: dict[str, Any]) -> str:
    """The table, its notes and its provenance."""
    header = ["Model", "method of the paper"]
    for column, cell in table["rows"][0]["columns"].items():
        header += [column, f"paper, {cell['paper_column']}"]
    places = 1 if table["artefact"] == "table1" else 2  # as the paper prints them
    rows = []
    for row in table["rows"]:
        rows.append([f"`{row['model']}`", row["paper_method"] or "-"])
        for cell in row["columns"].values():
            rows[-1] += [
                str(interval_cell(cell["ours"])),
                "-" if cell["paper"] is None else f"{cell['paper']:.{places}f}",
            ]
    notes = "".join(f"- {note}\n" for note in table["notes"])
    differences = _differences_markdown(table)
    made = "".join(f"- {line['what']}: {line['text']}\n" for line in table["made"])
    return (
        f"# {table['title']}\n\n{markdown_table(header, rows, left=2)}\n{differences}{notes}\n## Provenance\n\n{made}"
    )


def _differences_markdown(table: dict[str, Any]) -> str:
    if not table["differences"]:
        return ""
    header = ["Difference, paired by row"]
    for column in table["differences"][0]["columns"]:
        header += [column, "paper"]
    rows = []
    for found in table["differences"]:
        rows.append([f"`{found['model']}` - `{found['baseline']}`"])
        for cell in found["columns"].values():
            theirs = "-" if cell["paper"] is None else f"{cell['paper']:+.2f}"
            rows[-1] += [str(interval_cell(cell["ours"], sign="+")), theirs]
    return f"{markdown_table(header, rows)}\n"


def _to_csv(table: dict[str, Any]) -> str:
    """A line for each number: ours with its interval, and the paper's."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "paper_method", "column", "ours", "low", "high", "paper_column", "paper"])
    for row in table["rows"]:
        for column, cell in row["columns"].items():
            ours = cell["ours"]
            named = [row["model"], row["paper_method"], column]
            writer.writerow([*named, ours["mean"], ours["low"], ours["high"], cell["paper_column"], cell["paper"]])
    return text.getvalue()
