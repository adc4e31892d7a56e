"""The page of the study of objectives: writes the results of `objectives_study.py` into docs/results/objectives.md.

    python benchmarks/study_page.py --results OUT/results.jsonl --page docs/results/objectives.md

What stands before the line `<!-- results -->` stays as it is; what follows is written anew, with a figure beside the
page (objectives.png and .svg) and a copy of the results (objectives.jsonl), from which the page can be made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpkd.core.markdown import markdown_table
from dpkd.evaluate.metrics.inference import Interval, add_holm, mean_intervals, paired_differences
from dpkd.evaluate.report.cells import p_value_text

MARK = "<!-- results -->"
#: name of the line with the options of a study, and of the run that makes what arms share
FACTS, START = "study", "start"
#: arms that train with every seed whatever they reach: the default, its rival, and the published losses
ALWAYS = ("dpkd-all", "forward-kl", "dpkd-released", "eq9-lm", "writer-forward-kl")
_FLIPS = 20_000
Line = dict[str, Any]


def from_writer(arm: str) -> bool:
    """Whether an arm starts from the student that writes already."""
    return arm.startswith(("eq", "writer"))


def choose_finalists(lines: Sequence[Line], first_seed: int, number: int) -> list[str]:
    """The `number` arms with the best Rouge-L on the selection rows with the first seed, and `ALWAYS`."""
    scored = [line for line in lines if line["scored"] and line["seed"] == first_seed and "selection_rouge_l" in line]
    by_score = sorted(scored, key=lambda line: -line["selection_rouge_l"])
    names = [line["arm"] for line in by_score if not line["arm"].startswith(("entries", "mass"))]
    return list(dict.fromkeys([*names[:number], *(name for name in ALWAYS if name in names)]))


class Found:
    """The results of a study, by arm."""

    def __init__(self, results: Path) -> None:
        every = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
        self.facts: Line = next(line for line in every if line["arm"] == FACTS)
        lines = [line for line in every if "error" not in line]
        ended = {(line["arm"], line["rate"], line["seed"]) for line in lines}
        self.errors = [line for line in every if (line["arm"], line["rate"], line["seed"]) not in ended]
        self.start: Line = next((line for line in lines if line["arm"] == START), {})
        self.runs = [line for line in lines if line["arm"] not in (START, FACTS)]
        self.sets: list[str] = self.facts["options"]["eval"]
        self.scored: dict[str, list[Line]] = {}
        for line in self.runs:
            if line["scored"]:
                self.scored.setdefault(line["arm"], []).append(line)

    def rows(self, arm: str, data: str) -> np.ndarray:
        """Rouge-L of each row [training seeds, rows], the mean over generation seeds."""
        return np.array([line[f"{data}_rouge_rows"] for line in self.scored[arm]])

    def baseline(self, arm: str) -> str:
        """What an arm is compared with: forward KL for the same steps from the same start; without it, the default."""
        if from_writer(arm):
            return "writer-forward-kl"
        return "forward-kl" if "forward-kl" in self.scored else "dpkd-all"

    def mean(self, arm: str, key: str) -> float:
        return float(np.mean([line[key] for line in self.scored[arm]]))


def summary(directory: Path) -> str:
    """The tables so far; one line where there are none."""
    found = Found(directory / "results.jsonl")
    return results_text(found) if found.scored else f"{len(found.runs)} runs, none of them scored yet"


def results_text(found: Found) -> str:
    """All tables of the page."""
    arms = [arm for arm in found.scored if not arm.startswith(("entries", "mass"))]
    parts = [_setting(found)]
    if found.start:
        parts += ["### Teacher, start and writer", _references(found)]
    for title, chosen in (("From the start", False), ("From the student that writes", True)):
        names = [arm for arm in arms if from_writer(arm) is chosen]
        if names:
            parts += [f"### {title}: all arms, first seed", _arms_table(found, names)]
    if len(found.facts["options"]["seeds"]) > 1:
        compared = [arm for arm in arms if len(found.scored[arm]) > 1]
        title = "Finalists, several training seeds"
    else:
        compared, title = arms, "Compared with forward KL from the same start, one training seed"
    if compared and all(found.baseline(arm) in compared for arm in compared):
        parts += [f"### {title}", _comparisons(found, compared)]
    sizes = [name for name in found.facts["sizes"] if name in found.scored]
    if len(sizes) > 1:
        parts += ["### A smaller cache", _sizes(found, sizes)]
    if found.errors:
        failed = dict.fromkeys(f"`{line['arm']}` at {line['rate']:g}: {line['error']}" for line in found.errors)
        parts += ["### Runs that failed", "\n".join(f"- {text}" for text in failed)]
    return "\n\n".join(parts)


def _setting(found: Found) -> str:
    options = found.facts["options"]
    runs = {(line["arm"], line["rate"], line["seed"]): _is_elsewhere(found, line) for line in found.runs}
    elsewhere = sum(runs.values())
    marked = f" {elsewhere} runs, marked *, on the CPU: their seconds are longer." if elsewhere else ""
    return (
        f"{options['rows']} training rows, {options['select_rows']} selection rows, {options['eval_rows']} rows of "
        f"{', '.join(found.sets)}, {options['steps']} steps of 8 rows, answers of at most {options['max_new_tokens']} "
        f"tokens with seeds {', '.join(map(str, options['eval_seeds']))}; {len(runs)} runs, "
        f"{options['jobs']} at once.{marked}"
    )


def _is_elsewhere(found: Found, line: Line) -> bool:
    """Whether a run was on the CPU in a study that ran on a GPU."""
    return bool(line.get("device") == "cpu" and found.facts["options"]["device"] != "cpu")


def _interval(interval: Interval, sign: str = "") -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.mean:{sign}.2f}"
    return f"{interval.mean:{sign}.2f} [{interval.low:{sign}.2f}, {interval.high:{sign}.2f}]"


_COLUMNS = ("kl", "rkl", "own_rkl", "own_teacher_logprob", "own_entropy", "top1_agreement")
_HEADS = ("KL(p, q)", "KL(q, p)", "own KL(q, p)", "own log p", "own entropy", "top-1")


def _references(found: Found) -> str:
    data = found.sets[0]
    rows = []
    for name in ("teacher", "start", "writer"):
        line = found.start[name]
        scores = [line[f"{name}_rouge_l"] for name in found.sets]
        scores += [line[f"{data}_{key}"] for key in ("num_words", "self_repetition")]
        row = [name, *(f"{line[key]:.3f}" for key in _COLUMNS), *(f"{value:.2f}" for value in scores)]
        rows.append([*row, _cut(line, data)])
    scores = [f"Rouge-L, {name}" for name in found.sets]
    return markdown_table(["model", *_HEADS, *scores, "words", "repeated", "cut"], rows)


def _cut(line: Line, data: str) -> str:
    """Share of the answers that ended at the limit of tokens."""
    return f"{line[f'{data}_unfinished']:.0f}%"


def _arms_table(found: Found, arms: Sequence[str]) -> str:
    data = found.sets[0]
    first = found.facts["options"]["seeds"][0]
    rows = []
    for arm in arms:
        line = next((line for line in found.scored[arm] if line["seed"] == first), None)
        if line is None:
            continue
        (rouge,) = mean_intervals(np.array(line[f"{data}_rouge_rows"])[None, None], (0.0, 100.0))
        seconds = line["train_s"], line["round_s"] + _shared_round_s(found, arm)
        name = f"{arm} *" if _is_elsewhere(found, line) else arm
        row = [name, f"{line['rate']:g}", *(f"{line[key]:.3f}" for key in _COLUMNS), _interval(rouge)]
        row += [f"{line['selection_rouge_l']:.2f}", f"{line[f'{data}_num_words']:.0f}"]
        row += [f"{line[f'{data}_self_repetition']:.1f}", _cut(line, data)]
        rows.append([*row, *(f"{value:.0f}" for value in seconds)])
    rows.sort(key=lambda row: float(row[2]))
    last = (f"Rouge-L, {data}", "selection", "words", "repeated", "cut", "train s", "rounds s")
    return markdown_table(["arm", "rate", *_HEADS, *last], rows)


def _shared_round_s(found: Found, arm: str) -> float:
    """Seconds of the first round, which all arms on a round share; live arms draw as they train."""
    on_round = arm.startswith(("own", "mix", "minillm", "distillm2", "eq", "writer-mix", "writer-distillm2"))
    if not on_round or arm.endswith("-live"):
        return 0.0
    name = "writer" if from_writer(arm) else "student-mixed" if arm == "minillm-mixed" else "student"
    return sum(s for step, s in found.start.get("seconds", {}).items() if step.endswith(f"round {name}"))


def _comparisons(found: Found, arms: Sequence[str]) -> str:
    parts = []
    for data in found.sets:
        means = {arm: found.rows(arm, data).mean(axis=0) for arm in arms}
        others = [arm for arm in arms if arm != found.baseline(arm)]
        gaps = np.array([means[arm] - means[found.baseline(arm)] for arm in others]).reshape(len(others), -1)
        differences = paired_differences(gaps, _FLIPS, 0)
        family = [difference._asdict() for difference in differences]
        add_holm(family)
        against = dict(zip(others, family, strict=True))
        rows = []
        for arm in sorted(arms, key=lambda arm: -means[arm].mean()):
            seeds = found.rows(arm, data).mean(axis=1)
            (rouge,) = mean_intervals(found.rows(arm, data)[None], (0.0, 100.0))
            row = [arm, len(seeds), _interval(rouge), f"{seeds.std(ddof=1):.2f}" if len(seeds) > 1 else ""]
            row += [f"{found.mean(arm, key):.3f}" for key in ("kl", "rkl", "own_rkl", "own_teacher_logprob")]
            if arm not in against:
                rows.append([*row, "", "", ""])
                continue
            test = against[arm]
            gap = _interval(Interval(test["mean"], test["low"], test["high"]), "+")
            rows.append([*row, gap, p_value_text(test["p_value"]), p_value_text(test["p_holm"])])
        less = "less forward KL" if "forward-kl" in found.scored else "less dpkd-all"
        head = ["arm", "seeds", f"Rouge-L, {data}", "sd of seeds", *_HEADS[:4], less, "p", "p, Holm"]
        parts.append(markdown_table(head, rows))
    return "\n\n".join(parts)


def _sizes(found: Found, names: Sequence[str]) -> str:
    data = found.sets[0]
    rows = []
    for name in sorted(names, key=lambda name: found.facts["sizes"][name]["bytes"]):
        size = found.facts["sizes"][name]
        (rouge,) = mean_intervals(found.rows(name, data)[None], (0.0, 100.0))
        values = [f"{found.mean(name, key):.3f}" for key in ("kl", "rkl", "own_rkl", "top1_agreement")]
        label = f"{name} (64 entries)" if name == "dpkd-all" else name
        count = len(found.scored[name])
        rows.append([label, count, f"{size['entries']:.1f}", f"{size['bytes']:.0f}", *values, _interval(rouge)])
    head = ["cache", "seeds", "entries a position", "bytes a position", "KL(p, q)", "KL(q, p)", "own KL(q, p)", "top-1"]
    return markdown_table([*head, f"Rouge-L, {data}"], rows)


def draw(found: Found, path: Path) -> list[Path]:
    """Every arm as a row: Rouge-L with its interval, KL(p, q), and the reverse KL of the student's own samples."""
    from dpkd.core.plotting import COLOURS, GRID, frame_figure, new_figure, save_figure

    data = found.sets[0]
    arms = [arm for arm in found.scored if not arm.startswith(("entries", "mass"))]
    arms.sort(key=lambda arm: found.rows(arm, data).mean())
    figure, panels = new_figure(12, 2.2 + 0.2 * len(arms), 3, side_by_side=True)
    places = np.arange(len(arms))
    teacher = found.start.get("teacher")
    rouge = [mean_intervals(found.rows(arm, data)[None], (0.0, 100.0))[0] for arm in arms]
    values: list[list[Any]] = [
        [part.mean for part in rouge],
        *([found.mean(arm, key) for arm in arms] for key in ("kl", "own_rkl")),
    ]
    titles = (f"Rouge-L, {data}", "KL(p, q), teacher's responses (nats)", "KL(q, p), student's own (nats)")
    for panel, points, title in zip(panels, values, titles, strict=True):
        for number, (label, chosen) in enumerate((("from the start", False), ("from the writer", True))):
            if not (mine := [place for place in places if from_writer(arms[place]) is chosen]):
                continue
            panel.scatter([points[place] for place in mine], mine, color=COLOURS[number], label=label, s=20, zorder=3)
        panel.set_title(title, fontsize=9)
        panel.set_yticks(places, arms if panel is panels[0] else [], fontsize=7)
        panel.set_ylim(-0.8, len(arms) - 0.2)
        panel.grid(color=GRID, linewidth=0.6)
    for place, part in zip(places, rouge, strict=True):
        if part.low is not None:
            panels[0].plot([part.low, part.high], [place, place], color="#999999", linewidth=1)
    if teacher is not None:
        panels[0].axvline(teacher[f"{data}_rouge_l"], color="#333333", linewidth=0.8, linestyle="--", label="teacher")
    frame_figure(figure, panels, _setting(found))
    return save_figure(figure, path, "Rouge-L and distance from the teacher for every arm of the study")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="results.jsonl of the study")
    parser.add_argument("--page", type=Path, default=Path("docs/results/objectives.md"), help="page to write into")
    options = parser.parse_args()
    found = Found(options.results)
    protocol = options.page.read_text(encoding="utf-8").partition(MARK)[0]
    draw(found, options.page.with_suffix(""))
    figure = f"![Rouge-L and distance from the teacher, every arm]({options.page.stem}.png)"
    text = f"{protocol}{MARK}\n\n{figure}\n\n{results_text(found)}\n"
    options.page.write_text(text, encoding="utf-8")
    copy = options.page.with_suffix(".jsonl")
    if copy.resolve() != options.results.resolve():
        shutil.copyfile(options.results, copy)
    print(f"wrote {options.page}")


if __name__ == "__main__":
    main()
