"""The paper's tables with our numbers, and the paper's own beside them, marked as theirs."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.files import write_text
from dpkd.evaluate.metrics.buckets import Bucket
from dpkd.pipelines.reproduce.options import OURS_ALONE, ReproduceConfig
from dpkd.pipelines.reproduce.paper_values import SOURCE, paper_values
from dpkd.pipelines.reproduce.sources import Made, read_report, read_validations

_TITLES = {
    "table1": "Table 1: Rouge-L of teacher, baselines and DPKD",
    "table2": "Table 2: Rouge-L by form of the preference",
    "table3": "Table 3: ablation of the language-model loss and of length normalisation",
    "table4": "Table 4: exact match by length of the gold response in words",
    "table5": "Table 5: Rouge-L by length of the gold response in words",
    "fig5": "Fig. 5: Rouge-L by length of the gold response in words",
}


@dataclass(frozen=True)
class Cell:
    """One number of ours with its 95% interval (None: it has none), each seed's own, and the paper's (None: none)."""

    mean: float | None
    low: float | None
    high: float | None
    seeds: dict[int, float | None]
    paper: float | None


@dataclass(frozen=True)
class Table:
    """A table of the paper: `rows` are (our model, the paper's method, cells in the order of `columns`).

    `columns` are ours, `paper_columns` what the paper's number of each is of.
    """

    artefact: str
    title: str
    columns: list[str]
    paper_columns: list[str]
    rows: list[tuple[str, str, list[Cell]]]
    notes: list[str]
    made: Made


def build_table(config: ReproduceConfig, made: Made) -> Table:
    """The table (or Fig. 5's numbers) that `config` names; raises `UserError` when a step's output is missing."""
    assert config.report is not None
    report = read_report(config.report)
    theirs = paper_values(config.artefact, config.paper)
    by_row = {model: _row_cells(config, report, model, theirs.get(method, {})) for model, method in config.rows.items()}
    columns = list(next(iter(by_row.values())))
    of_sets = config.artefact in ("table1", "table2")
    paper_columns = list(config.data.values()) if of_sets else [column.split(" (n=")[0] for column in columns]
    rows = [
        (model, "" if method == OURS_ALONE else method, [by_row[model][column] for column in columns])
        for model, method in config.rows.items()
    ]
    return Table(
        config.artefact, _TITLES[config.artefact], columns, paper_columns, rows, _notes(config, bool(theirs)), made
    )


def _row_cells(
    config: ReproduceConfig, report: dict[str, Any], model: str, theirs: dict[str, float | None]
) -> dict[str, Cell]:
    """The cells of one model by column."""
    of_sets = report["models"][model]["data"]
    if config.artefact in ("table1", "table2"):
        return {ours: _cell(of_sets[ours], "rouge_l", theirs.get(paper)) for ours, paper in config.data.items()}
    summary = of_sets[next(iter(config.data))]
    if config.artefact in ("table4", "table5", "fig5"):
        metric = "exact_match" if config.artefact == "table4" else "rouge_l"
        labelled = {f"{Bucket(part['low'], part['high']).label}": part for part in summary["buckets"]}
        return {f"{label} (n={part['n']})": _cell(part, metric, theirs.get(label)) for label, part in labelled.items()}
    if model not in config.runs:
        raise UserError("a row of table3 has no run", found=repr(model), expected="runs." + model, where="[reproduce]")
    lines = read_validations(config.runs[model])
    return {
        "Rouge-L": _cell(summary, "rouge_l", theirs.get("Rouge-L")),
        "rKLD min": _alone(min(line["rkld_first"] for line in lines), theirs.get("rKLD min")),
        "reward max": _alone(max(line["reward_chosen"] for line in lines), theirs.get("reward max")),
    }


def _cell(summary: dict[str, Any], metric: str, paper: float | None) -> Cell:
    value = summary[metric]
    seeds = {seed["seed"]: seed[metric] for seed in summary["seeds"]}
    return Cell(value["mean"], value["low"], value["high"], seeds, paper)


def _alone(value: float, paper: float | None) -> Cell:
    return Cell(value, None, None, {}, paper)


def _notes(config: ReproduceConfig, has_paper: bool) -> list[str]:
    as_bars = config.artefact == "fig5"
    ours, theirs = ("Bars", "Diamonds") if as_bars else ("Ours", "Columns marked paper")
    where = "as lines" if as_bars else "in brackets"
    notes = [f"{ours}: mean over seeds and, {where}, the 95% bootstrap interval over rows; from 0 to 100."]
    if has_paper:
        notes.append(f"{theirs} are the paper's numbers ({SOURCE}, {_family_text(config)}), not ours.")
    if config.other_data:
        notes.append(f"Our data are {config.other_data}: the two do not compare.")
    if config.artefact == "table3":
        notes.append(
            "rKLD min is the least KL(student, teacher) in nats on the first response token, reward max the largest "
            "mean beta log q/p of the teacher's responses (divided by their length where the loss is), over the "
            "validations of the run."
        )
    return notes


def _family_text(config: ReproduceConfig) -> str:
    return {
        "gpt2-120m": "GPT-2 120M from 1.5B",
        "gpt2-340m": "GPT-2 340M from 1.5B",
        "opt-1.3b": "OPT 1.3B from 13B",
    }[config.paper]


def write_table(table: Table, out: Path) -> list[Path]:
    """Write `table` to OUT/NAME.md, .csv and .json; the paths."""
    files = {".md": to_markdown(table), ".csv": to_csv(table), ".json": to_json(table)}
    for suffix, text in files.items():
        write_text(out / f"{table.artefact}{suffix}", text)
    return [out / f"{table.artefact}{suffix}" for suffix in files]


def to_markdown(table: Table) -> str:
    """The table, its notes and how it was made."""
    header = ["Model", "method of the paper"]
    places = 1 if table.artefact == "table1" else 2  # as the paper prints them
    for column, of in zip(table.columns, table.paper_columns, strict=True):
        header += [column, f"paper, {of}"]
    lines = [header, ["---", "---", *["---:"] * (2 * len(table.columns))]]
    for model, method, cells in table.rows:
        line = [f"`{model}`", method or "-"]
        for cell in cells:
            line += [_ours(cell), "-" if cell.paper is None else f"{cell.paper:.{places}f}"]
        lines.append(line)
    body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    notes = "".join(f"- {note}\n" for note in table.notes)
    made = "".join(f"- {what}: {text}\n" for what, text in table.made.lines)
    return f"# {table.title}\n\n{body}\n{notes}\n## How it was made\n\n{made}"


def _ours(cell: Cell) -> str:
    if cell.mean is None:
        return "-"
    return f"{cell.mean:.2f}" if cell.low is None else f"{cell.mean:.2f} [{cell.low:.2f}, {cell.high:.2f}]"


def to_csv(table: Table) -> str:
    """A line for each number: ours with its interval, and the paper's."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "paper_method", "column", "ours", "low", "high", "paper_column", "paper"])
    for model, method, cells in table.rows:
        for column, of, cell in zip(table.columns, table.paper_columns, cells, strict=True):
            writer.writerow([model, method, column, cell.mean, cell.low, cell.high, of, cell.paper])
    return text.getvalue()


def to_json(table: Table) -> str:
    """Everything, each seed's numbers too."""
    rows = [
        {
            "model": model,
            "paper_method": method or None,
            "columns": {
                column: {
                    "ours": {"mean": cell.mean, "low": cell.low, "high": cell.high},
                    "seeds": [{"seed": seed, "mean": mean} for seed, mean in cell.seeds.items()],
                    "paper_column": of,
                    "paper": cell.paper,
                }
                for column, of, cell in zip(table.columns, table.paper_columns, cells, strict=True)
            },
        }
        for model, method, cells in table.rows
    ]
    content = {
        "artefact": table.artefact,
        "title": table.title,
        "rows": rows,
        "notes": table.notes,
        "paper": SOURCE,
        **table.made.as_dict(),
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
