"""The paper's figures from our runs: each as PNG and SVG with its provenance, and as JSON with its data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpkd.core.errors import UserError
from dpkd.core.files import write_json
from dpkd.core.plotting import COLOURS, GRID, caption_text, frame_figure, grouped_bars, new_figure, save_figure
from dpkd.pipelines.commands.noise import REPORT as NOISE_REPORT
from dpkd.pipelines.reproduce.options import ReproduceConfig
from dpkd.pipelines.reproduce.paper_values import FIG2_SPANS, SOURCE
from dpkd.pipelines.reproduce.sources import read_json, read_validations

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RKLD = "KL(student, teacher), first response token (nats)"
_REWARD = "implicit reward of the teacher's response"
_NEVER_POSITIVE = (
    "The reward (Eq. 29) of the teacher's own responses is at most 0 on average, where student and teacher agree: the "
    "paper's rewards of up to 0.97 (its Table 3) are of another quantity, which it does not name."
)
_CHARACTERS_PER_INCH = 19
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def draw_judge(config: ReproduceConfig, made: dict[str, Any]) -> list[Path]:
    """Fig. 1: how a judge model rates each method; the paper prints no numbers for it."""
    from dpkd.evaluate.judge.plot import plot_judge

    assert config.judge is not None
    report = read_json(config.judge / "judge.json")
    paths = [*plot_judge(report, config.out / "fig1"), config.out / "fig1.json"]
    write_json(paths[-1], {"artefact": "fig1", "judge": report, **made})
    return paths


def draw_noise(config: ReproduceConfig, made: dict[str, Any]) -> list[Path]:
    """Fig. 2: rKLD, implicit reward and Rouge-L of copies with noise on their weights."""
    points = noise_points(config)
    spans = {name: max(p[name] for p in points) - min(p[name] for p in points) for name in ("rkld", "rouge_l")}
    notes = [
        f"{len(points)} copies; rKLD varies by {spans['rkld']:.3g} nats and Rouge-L by {spans['rouge_l']:.2f} "
        f"({SOURCE}: by {FIG2_SPANS['rkld']:g} and {FIG2_SPANS['rouge_l']:g}, with noise of a size that it does not "
        "state).",
        "Noise: Gaussian, its standard deviation relative to the root mean square of each weight matrix (colour); one "
        "marker per seed. Lines: 95% interval over rows. Reward: beta/|y| log q(y)/p(y).",
        *_other_data(config),
    ]
    data = {"artefact": "fig2", "points": points, "spans": spans, "notes": notes, **made}
    figure, panels = _new_sheet(data, 3)
    axes = (("rkld", "rouge_l"), ("reward", "rouge_l"), ("rkld", "reward"))
    labels = {"rkld": _RKLD, "reward": _REWARD, "rouge_l": "Rouge-L (0 to 100)"}
    scales, seeds = (sorted({point[key] for point in points}) for key in ("scale", "seed"))
    for panel, (x, y) in zip(panels, axes, strict=True):
        for point in points:
            colour = COLOURS[scales.index(point["scale"]) % len(COLOURS)]
            marker = _MARKERS[seeds.index(point["seed"]) % len(_MARKERS)]
            if y == "rouge_l":
                low, high = point["rouge_l_low"], point["rouge_l_high"]
                panel.vlines(point[x], low, high, color=colour, alpha=0.5, linewidth=1)
            label = f"noise {point['scale']:g}"
            panel.plot(point[x], point[y], marker, color=colour, markersize=6, markeredgecolor="white", label=label)
        panel.set_xlabel(labels[x], fontsize=9)
        panel.set_ylabel(labels[y], fontsize=9)
    return _save_sheet(figure, panels, "Fig. 2: copies with noise on their weights", data, config.out)


def noise_points(config: ReproduceConfig) -> list[dict[str, Any]]:
    """A point for each copy: scale, seed, `rkld` and `kld` on the first token, `reward`, Rouge-L of all and each seed.

    Raises `UserError` for a copy that was not evaluated.
    """
    assert config.report is not None
    assert config.noise is not None
    report, noise = read_json(config.report / "report.json"), read_json(config.noise / NOISE_REPORT)
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


def draw_trajectory(config: ReproduceConfig, made: dict[str, Any]) -> list[Path]:
    """Fig. 3: rKLD against reward over the checkpoints of a training; the colour is the epoch."""
    notes = [
        "A point is the student at one validation, its colour the epoch (each round starts a new one), the ring the "
        "end. The paper draws runs that end upper left: low KL, high reward (it prints no numbers).",
        _NEVER_POSITIVE,
        *_other_data(config),
    ]
    curves, data = _curves("fig3", config, notes, made)
    figure, panels = _new_sheet(data, 1)
    epochs = sorted({line["epoch"] for lines in curves.values() for line in lines})
    for index, (name, lines) in enumerate(curves.items()):
        x, y = [line["rkld_first"] for line in lines], [line["reward_chosen"] for line in lines]
        panels[0].plot(x, y, color="#BBBBBB", linewidth=0.8, zorder=1)
        points = panels[0].scatter(
            x, y, c=[line["epoch"] for line in lines], cmap="viridis", vmin=epochs[0], vmax=max(epochs[-1], 2), s=34,
            marker=_MARKERS[index % len(_MARKERS)], label=name, zorder=2,
        )  # fmt: skip
        panels[0].scatter(x[-1:], y[-1:], s=130, facecolors="none", edgecolors="black", zorder=3)
    panels[0].set_xlabel(_RKLD)
    panels[0].set_ylabel(_REWARD)
    figure.colorbar(points, ax=panels[0], label="epoch", ticks=epochs if len(epochs) < 12 else None)
    return _save_sheet(figure, panels, "Fig. 3: rKLD against implicit reward over checkpoints", data, config.out)


def draw_curves(config: ReproduceConfig, made: dict[str, Any]) -> list[Path]:
    """Fig. 4: reward, KLD and rKLD over a training."""
    notes = [
        "Validations over training steps; the paper prints no numbers for this figure.",
        "Dotted lines: the end of a round, after which the student answered again.",
        _NEVER_POSITIVE,
        *_other_data(config),
    ]
    curves, data = _curves("fig4", config, notes, made)
    figure, panels = _new_sheet(data, 3)
    titles = {
        "reward_chosen": _REWARD,
        "kld_first": "KL(teacher, student), first token (nats)",
        "rkld_first": "KL(student, teacher), first token (nats)",
    }
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for index, (name, lines) in enumerate(curves.items()):
            colour = COLOURS[index % len(COLOURS)]
            values = [line[key] for line in lines]
            panel.plot([line["step"] for line in lines], values, "-o", color=colour, markersize=4, label=name)
            for line, following in pairwise(lines):
                if line["run"] != following["run"]:
                    panel.axvline(line["step"], color="#999999", linestyle=":", linewidth=1)
        panel.set_xlabel("step")
        panel.set_title(title, fontsize=9)
    return _save_sheet(figure, panels, "Fig. 4: reward, KLD and rKLD over training", data, config.out)


def _curves(
    artefact: str, config: ReproduceConfig, notes: list[str], made: dict[str, Any]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """The validations of each run, and the content of the figure's JSON file."""
    curves = {name: read_validations(runs) for name, runs in config.runs.items()}
    keys = ("run", "step", "epoch", "reward_chosen", "kld_first", "rkld_first", "kld", "rkld", "reward_margin")
    shown = {name: [{key: line[key] for key in keys} for line in lines] for name, lines in curves.items()}
    return curves, {"artefact": artefact, "runs": shown, "notes": notes, **made}


def draw_buckets(config: ReproduceConfig, table: dict[str, Any]) -> list[Path]:
    """Fig. 5: Table 5 as bars, ours with intervals, the paper's numbers as diamonds."""
    figure, panels = _new_sheet(table, 1)
    cells = {row["model"]: list(row["columns"].values()) for row in table["rows"]}
    ours = {model: [cell["ours"] for cell in row] for model, row in cells.items()}
    grouped_bars(panels[0], ours, list(table["rows"][0]["columns"]))
    for index, row in enumerate(cells.values()):
        centre = (index - (len(cells) - 1) / 2) * 0.8 / len(cells)
        paper = {place + centre: cell["paper"] for place, cell in enumerate(row) if cell["paper"] is not None}
        if paper:
            panels[0].plot(
                list(paper), list(paper.values()), "D", color="white", markeredgecolor="black", label="paper"
            )
    panels[0].set_xlabel("length of the gold response in words")
    panels[0].set_ylabel("Rouge-L (0 to 100)")
    panels[0].set_ylim(bottom=0)
    return _save_sheet(figure, panels, table["title"], table, config.out)


def _other_data(config: ReproduceConfig) -> list[str]:
    return [f"Our data are {config.other_data}."] if config.other_data else []


def _new_sheet(data: dict[str, Any], num_panels: int) -> tuple[Figure, list[Axes]]:
    """Panels side by side, with space for the caption of `data`."""
    height = 4.6 + 0.12 * len(_caption(data, num_panels).splitlines())
    figure, panels = new_figure(_sheet_width(num_panels), height, num_panels, side_by_side=True)
    for panel in panels:
        panel.grid(color=GRID, linewidth=0.8)
        panel.tick_params(labelsize=8)
    return figure, panels


def _sheet_width(num_panels: int) -> float:
    return max(8.0, 4.0 * num_panels)


def _caption(data: dict[str, Any], num_panels: int) -> str:
    """The notes and the whole provenance."""
    lines = [*data["notes"], *(f"{line['what']}: {line['text']}" for line in data["made"][1:])]
    width = int(_CHARACTERS_PER_INCH * _sheet_width(num_panels))
    return caption_text(lines, f"Command: {data['command']}", f"{data['artefact']}.json", width)


def _save_sheet(figure: Figure, panels: Sequence[Axes], title: str, data: dict[str, Any], out: Path) -> list[Path]:
    """Write the figure, and `data`, which it shows, next to it; the paths."""
    caption = _caption(data, len(panels))
    frame_figure(figure, panels, caption, title)
    paths = [*save_figure(figure, out / data["artefact"], caption), out / f"{data['artefact']}.json"]
    write_json(paths[-1], data)
    return paths
