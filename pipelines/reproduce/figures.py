"""The paper's figures from our runs: each as PNG and SVG with the data behind it, and what it is of in small print."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpkd.core.errors import UserError
from dpkd.pipelines.reproduce.figure_sheet import COLOURS, MARKERS, new_sheet, save_sheet
from dpkd.pipelines.reproduce.options import ReproduceConfig
from dpkd.pipelines.reproduce.paper_values import FIG2_SPANS, SOURCE
from dpkd.pipelines.reproduce.sources import Made, read_json, read_noise, read_report, read_validations
from dpkd.pipelines.reproduce.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RKLD = "KL(student, teacher), first response token (nats)"
_REWARD = "implicit reward of the teacher's response"


def draw_judge(config: ReproduceConfig, made: Made) -> list[Path]:
    """Fig. 1: what a judge model says of each method; the paper prints no numbers of it."""
    from dpkd.core.files import write_json
    from dpkd.evaluate.judge.plot import plot_judge

    assert config.judge is not None
    report = read_json(config.judge / "judge.json")
    paths = [*plot_judge(report, config.out / "fig1"), config.out / "fig1.json"]
    write_json(paths[-1], {"artefact": "fig1", "judge": report, **made.as_dict()})
    return paths


def draw_noise(config: ReproduceConfig, made: Made) -> list[Path]:
    """Fig. 2: rKLD, implicit reward and Rouge-L of copies with noise on their weights."""
    points = noise_points(config)
    scales = sorted({point["scale"] for point in points})
    spans = {name: max(p[name] for p in points) - min(p[name] for p in points) for name in ("rkld", "rouge_l")}
    notes = [
        f"{len(points)} copies; rKLD moves by {spans['rkld']:.3g} nats while Rouge-L moves by {spans['rouge_l']:.2f} "
        f"({SOURCE}: by {FIG2_SPANS['rkld']:g} while Rouge-L moves by {FIG2_SPANS['rouge_l']:g}, of noise whose size "
        "it does not state).",
        "Noise: Gaussian, its standard deviation in shares of each weight matrix's root mean square (colour), one "
        "marker a seed. Bars: 95% bootstrap interval over rows. Reward: beta/|y| log q(y)/p(y).",
        *_other_data(config),
    ]
    figure, panels = new_sheet("Fig. 2: copies with noise on their weights", made, notes, 3)
    pairs = (("rkld", "rouge_l"), ("reward", "rouge_l"), ("rkld", "reward"))
    labels = {"rkld": _RKLD, "reward": _REWARD, "rouge_l": "Rouge-L (0 to 100)"}
    seeds = sorted({point["seed"] for point in points})
    for panel, (x, y) in zip(panels, pairs, strict=True):
        for point in points:
            colour = COLOURS[scales.index(point["scale"]) % len(COLOURS)]
            marker = MARKERS[seeds.index(point["seed"]) % len(MARKERS)]
            if y == "rouge_l":
                low, high = point["rouge_l_low"], point["rouge_l_high"]
                panel.vlines(point[x], low, high, color=colour, alpha=0.5, linewidth=1)
            panel.plot(point[x], point[y], marker, color=colour, markersize=6, markeredgecolor="white")
        panel.set_xlabel(labels[x], fontsize=9)
        panel.set_ylabel(labels[y], fontsize=9)
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker="o", linestyle="", color=COLOURS[place % len(COLOURS)], label=f"noise {scale:g}")
        for place, scale in enumerate(scales)
    ]
    panels[-1].legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=8)
    data = {"artefact": "fig2", "points": points, "spans": spans, "notes": notes, **made.as_dict()}
    return save_sheet(figure, config.out, "fig2", data)


def noise_points(config: ReproduceConfig) -> list[dict[str, Any]]:
    """A point for each copy: scale, seed, `rkld` and `kld` on the first token, `reward`, Rouge-L by seed and in all.

    Raises `UserError` for a copy that the evaluation does not know by the fingerprint of its weights.
    """
    assert config.report is not None
    assert config.noise is not None
    report, noise = read_report(config.report), read_noise(config.noise)
    by_directory = {Path(model["directory"]): name for name, model in report["models"].items() if model["directory"]}
    points = []
    for copy in noise["copies"]:
        name = by_directory.get(config.noise / copy["name"])
        if name is None:
            raise UserError("a copy with noise was not evaluated", found=copy["name"], where=config.report)
        summary = report["models"][name]["data"][next(iter(config.data))]
        rouge = summary["rouge_l"]
        points.append(
            {
                "name": copy["name"], "scale": copy["scale"], "seed": copy["seed"],
                "rkld": copy["rkld_first"], "kld": copy["kld_first"], "reward": copy["reward"],
                "rkld_all_tokens": copy["rkld"], "kld_all_tokens": copy["kl"],
                "rouge_l": rouge["mean"], "rouge_l_low": rouge["low"], "rouge_l_high": rouge["high"],
                "seeds": [{"seed": seed["seed"], "rouge_l": seed["rouge_l"]} for seed in summary["seeds"]],
            }
        )  # fmt: skip
    return points


def draw_trajectory(config: ReproduceConfig, made: Made) -> list[Path]:
    """Fig. 3: rKLD against reward over the checkpoints of a training, colour = epoch."""
    lines = {name: read_validations(runs) for name, runs in config.runs.items()}
    epochs = sorted({line["epoch"] for found in lines.values() for line in found})
    notes = [
        "A point is the student at one validation, its colour the epoch (a round begins a new one), the ring the end. "
        f"{SOURCE} draws runs that end upper left: low KL, high reward (it prints no numbers).",
        *_other_data(config),
    ]
    figure, (panel,) = new_sheet("Fig. 3: rKLD against implicit reward over checkpoints", made, notes, 1)
    points = None
    for place, (name, found) in enumerate(lines.items()):
        x, y = [line["rkld_first"] for line in found], [line["reward_chosen"] for line in found]
        panel.plot(x, y, color="#BBBBBB", linewidth=0.8, zorder=1)
        points = panel.scatter(
            x, y, c=[line["epoch"] for line in found], cmap="viridis", vmin=epochs[0], vmax=max(epochs[-1], 2), s=34,
            marker=MARKERS[place % len(MARKERS)], label=name, zorder=2,
        )  # fmt: skip
        panel.scatter(x[-1:], y[-1:], s=130, facecolors="none", edgecolors="black", zorder=3)
    panel.set_xlabel(_RKLD)
    panel.set_ylabel(_REWARD)
    panel.legend(frameon=False, fontsize=9)
    assert points is not None  # the config's own check
    figure.colorbar(points, ax=panel, label="epoch", ticks=epochs if len(epochs) < 12 else None)
    return save_sheet(figure, config.out, "fig3", _curve_data("fig3", lines, notes, made))


def draw_curves(config: ReproduceConfig, made: Made) -> list[Path]:
    """Fig. 4: reward, KLD and rKLD over a training."""
    lines = {name: read_validations(runs) for name, runs in config.runs.items()}
    notes = [
        f"Validations over training steps; {SOURCE} prints no numbers of this figure.",
        "Dotted lines: where a round ended and the student answered anew.",
        *_other_data(config),
    ]
    figure, panels = new_sheet("Fig. 4: reward, KLD and rKLD over training", made, notes, 3)
    titles = {
        "reward_chosen": _REWARD,
        "kld_first": "KL(teacher, student), first token (nats)",
        "rkld_first": "KL(student, teacher), first token (nats)",
    }
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for place, (name, found) in enumerate(lines.items()):
            colour = COLOURS[place % len(COLOURS)]
            panel.plot(
                [line["step"] for line in found], [line[key] for line in found],
                color=colour, marker=MARKERS[place % len(MARKERS)], markersize=4, linewidth=1.4, label=name,
            )  # fmt: skip
            _mark_rounds(panel, found)
        panel.set_xlabel("step")
        panel.set_title(title, fontsize=9)
    panels[0].legend(frameon=False, fontsize=9)
    return save_sheet(figure, config.out, "fig4", _curve_data("fig4", lines, notes, made))


def _mark_rounds(panel: Axes, lines: list[dict[str, Any]]) -> None:
    for line, following in pairwise(lines):
        if line["run"] != following["run"]:
            panel.axvline(line["step"], color="#999999", linestyle=":", linewidth=1)


def _curve_data(name: str, lines: dict[str, list[dict[str, Any]]], notes: list[str], made: Made) -> dict[str, Any]:
    keys = ("run", "step", "epoch", "reward_chosen", "kld_first", "rkld_first", "kld", "rkld", "reward_margin")
    return {
        "artefact": name,
        "runs": {run: [{key: line[key] for key in keys} for line in found] for run, found in lines.items()},
        "notes": notes,
        **made.as_dict(),
    }


def draw_buckets(config: ReproduceConfig, table: Table) -> list[Path]:
    """Fig. 5: Table 5 as bars, ours with intervals, the paper's numbers as diamonds."""
    import json

    from dpkd.pipelines.reproduce.tables import to_json

    figure, (panel,) = new_sheet(table.title, table.made, table.notes, 1)
    width = 0.8 / len(table.rows)
    marked = False
    for place, (model, _, cells) in enumerate(table.rows):
        shift = (place - (len(table.rows) - 1) / 2) * width
        for index, cell in enumerate(cells):
            x, label = index + shift, model if index == 0 else None
            if cell.mean is not None and cell.low is not None and cell.high is not None:
                ends = [[max(0.0, cell.mean - cell.low)], [max(0.0, cell.high - cell.mean)]]
                panel.bar(
                    x, cell.mean, width * 0.92, yerr=ends, color=COLOURS[place % len(COLOURS)], label=label,
                    hatch="//" if place >= len(COLOURS) else "", edgecolor="white",
                    error_kw={"elinewidth": 1.0, "capsize": 2, "ecolor": "#333333"},
                )  # fmt: skip
            if cell.paper is not None:
                panel.plot(
                    x, cell.paper, "D", color="white", markeredgecolor="black", markersize=5,
                    label=None if marked else "paper",
                )  # fmt: skip
                marked = True
    panel.set_xticks(range(len(table.columns)), table.columns)
    panel.grid(visible=False, axis="x")
    panel.set_xlabel("length of the gold response in words")
    panel.set_ylabel("Rouge-L (0 to 100)")
    panel.set_ylim(bottom=0)
    panel.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False, fontsize=8)
    return save_sheet(figure, config.out, "fig5", json.loads(to_json(table)))


def _other_data(config: ReproduceConfig) -> list[str]:
    return [f"Our data are {config.other_data}."] if config.other_data else []
