"""The report of `dpkd cache fidelity` as Markdown."""

from __future__ import annotations

from typing import Any

from dpkd.core.markdown import markdown_table

_VERDICTS = {True: "holds", False: "DOES NOT HOLD", None: "unknown, the controls are larger than the grid"}


def fidelity_table(report: dict[str, Any]) -> str:
    """The report as Markdown. Ends with a line break."""
    cache, live, size, kept = report["cache"], report["live"], report["size"], report["distributions"]
    entries = f"top {cache['top_k']}" if cache["top_mass"] is None else f"top mass {cache['top_mass']:g}"
    if cache["top_mass"] is not None:
        entries += f", at most {cache['top_k']}"
    lines = [
        f"{report['rows']} of {cache['rows']} rows of `{cache['location']}` ({cache['fingerprint']}; {entries}), "
        f"{report['positions']} positions, {report['entries']} entries. Teacher {cache['teacher']} "
        f"({cache['weights'] or 'weights unknown'}), {cache['dtype']} by {cache['engine']}; "
        f"live in {live['dtype']} by {live['engine']}.",
        "",
    ]
    header = (
        "log-prob distance (nats)",
        "sampled max",
        "mean",
        "entries max",
        "mean",
        "by probability",
        "other ids at",
    )
    names = {
        "cached_vs_live": f"cache against live {live['engine']}",
        "cached_vs_transformers": "cache against transformers' full logits",
        "live_vs_itself": f"control: live {live['engine']} against itself",
        "live_vs_transformers": f"control: live {live['engine']} against transformers' full logits",
    }
    lines.append(markdown_table(header, [(name, *_comparison_cells(report[key])) for key, name in names.items()]))
    facts = {"bytes per position": f"{size['bytes_per_position']:.2f}"}
    if kept is not None:
        facts |= {
            "bytes per kept entry": f"{size['bytes_per_entry']:.3f}",
            "entries per position": f"{size['entries_per_position']:.2f}",
            "KL(teacher to cached), nats": f"{kept['kl']:.5f}",
            "of it from the cut": f"{kept['kl_cut']:.5f}",
            "of it from the grid": f"{kept['kl_grid']:.2e}",
            "probability kept": f"{kept['mass_kept']:.4f}",
            "error of the stored tail mass, max and mean": f"{_pair(kept['tail_error'])}",
            "error of the stored total, max and mean": f"{_pair(kept['total_error'])}",
        }
    lines.append(markdown_table(("metric", "value"), facts.items()))
    if report["bound"] is not None:
        bound = report["bound"]
        lines.append(
            f"Largest error of a kept entry: {bound['max_error_nats']:.6f} nats. Bound: {bound['grid_nats']:.6f} (grid)"
            f" + {bound['noise_nats']:.6f} (controls): {_VERDICTS[bound['holds']]}.\n"
        )
    if report["pilot"] is not None:
        lines.append(_pilot_table(report["pilot"]))
    return "\n".join(lines).rstrip() + "\n"


def _pilot_table(pilot: dict[str, Any]) -> str:
    most = pilot["runs"][-1]["top_k"]
    header = ("K in training", "held-out KL (nats), mean and spread", f"over K = {most}, same seeds")
    rows = [
        (
            str(run["top_k"]),
            f"{run['kl_mean']:.4f} ± {run['kl_spread']:.4f}",
            "-" if run["top_k"] == most else f"{run['over_mean']:+.4f} ± {run['over_spread']:.4f}",
        )
        for run in pilot["runs"]
    ]
    return (
        f"Copies of `{pilot['student']}`, {pilot['steps']} steps, {pilot['seeds']} seeds each, on {pilot['held_out']} "
        f"held-out examples with all entries of the cache; before training {pilot['kl_before']:.4f}. The spread is the "
        f"standard deviation over seeds.\n\n{markdown_table(header, rows)}"
    )


def _comparison_cells(comparison: dict[str, Any]) -> list[str]:
    sampled, entries = comparison["sampled"], comparison["entries"]
    cells = [f"{sampled['max']:.2e}", f"{sampled['mean']:.2e}"]
    if entries is None:
        return cells + ["-"] * 4
    cells += [f"{entries[key]:.2e}" for key in ("max", "mean", "weighted_mean")]
    return [*cells, str(entries["positions_with_other_ids"])]


def _pair(values: dict[str, float]) -> str:
    return f"{values['max']:.2e}, {values['mean']:.2e}"
