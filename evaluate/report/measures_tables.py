"""How far each model is from the teacher of a cache, as a table."""

from __future__ import annotations

from typing import Any

from dpkd.evaluate.report.tables import Cell, Table

TITLE = "Against the teacher of the cache"

_COLUMNS = {
    "KL": ("kl", 1.0),
    "reverse KL": ("rkld", 1.0),
    "KL, first token": ("kld_first", 1.0),
    "reverse KL, first token": ("rkld_first", 1.0),
    "same likeliest token %": ("top1_agreement", 100.0),
    "perplexity of cached responses": ("perplexity", 1.0),
}


def teacher_table(report: dict[str, Any]) -> Table | None:
    """The models whose divergence was measured; None where no model's was."""
    measured = {name: model["to_teacher"] for name, model in report["models"].items() if model.get("to_teacher")}
    if not measured:
        return None
    rows: list[tuple[tuple[str, ...], list[Cell]]] = [
        ((name,), [_cell(found[key], scale) for key, scale in _COLUMNS.values()]) for name, found in measured.items()
    ]
    counts = {(found["num_rows"], found["num_tokens"]) for found in measured.values()}
    over = "; ".join(f"{num_rows} rows, {num_tokens} tokens" for num_rows, num_tokens in sorted(counts))
    note = (
        f"Over cached responses ({over}); KL(teacher || model) and the reverse in nats a token, tokens outside the "
        "kept entries taken as one outcome; in brackets the 95% bootstrap interval over rows."
    )
    return Table(TITLE, list(_COLUMNS), rows, note=note)


def _cell(interval: dict[str, float], scale: float) -> Cell:
    mean, low, high = (scale * interval[end] for end in ("mean", "low", "high"))
    return Cell(f"{mean:.3f}", f"[{low:.3f}, {high:.3f}]")
