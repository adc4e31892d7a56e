"""Size of a cache against what it loses, for fixed and adaptive numbers of entries, on a real teacher's distributions.

    python benchmarks/cache_size.py --teacher models/smollm2-135m-instruct --data examples/dolly/train.jsonl \\
        --rows 128 --out docs/results

transformers scores the reference answers once, with full distributions. dpkd's own code (`from_top_k`, `to_table`,
`encode_shard`) then makes a cache of every setting, whose loss is measured on the decoded values. Writes
`cache-size.md` and `cache-size.png` to --out and prints the table.
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq

from dpkd.core.models import ModelSource, locate_model
from dpkd.core.progress import Progress, say
from dpkd.core.prompts.sources import open_examples
from dpkd.core.prompts.templates import PromptEncoder, TemplateName
from dpkd.teacher_cache.audit.fidelity_measures import (
    CutLoss,
    FullDistributions,
    Scores,
    full_distributions,
)
from dpkd.teacher_cache.build.plan import RowPlan
from dpkd.teacher_cache.build.survey import Part
from dpkd.teacher_cache.engines.engine import Distributions, EngineResult
from dpkd.teacher_cache.engines.top_k import from_top_k
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.codec import decode_logprobs, encode_logprobs
from dpkd.teacher_cache.store.rows import PlannedRow
from dpkd.teacher_cache.store.shards import encode_shard
from dpkd.teacher_cache.store.tables import to_table

FIXED = (8, 16, 32, 64, 128, 256)
MASSES = (0.80, 0.90, 0.95, 0.98)
MOST = (64, 128, 256)
DETAILED = "64"  # the setting whose columns are listed: the default of `dpkd cache-teacher`


@dataclass
class Setting:
    """One way to keep entries, with its results: losses by position, scored rows, largest rounding error (nats)."""

    top_k: int
    top_mass: float | None = None
    losses: list[CutLoss] = field(default_factory=list)
    rows: list[tuple[PlannedRow, EngineResult, str]] = field(default_factory=list)
    max_error_nats: float = 0.0

    @property
    def label(self) -> str:
        """Short name: `64`, or `0.95, at most 128`."""
        return f"{self.top_k}" if self.top_mass is None else f"{self.top_mass:.2f}, at most {self.top_k}"

    def take(self, full: FullDistributions, table: tuple[np.ndarray, np.ndarray], ids_T: np.ndarray) -> Scores:
        """What an engine would return for these positions; records what is lost when it is stored."""
        ids_TK, logprobs_TK = (values[:, : self.top_k] for values in table)
        sampled_T = full.logprobs_of(ids_T)
        top = from_top_k(ids_TK, logprobs_TK, ids_T, sampled_T, full.vocab_size, self.top_mass)
        steps_E = encode_logprobs(top.logprobs_E, top.counts_T)
        stored = replace(top, logprobs_E=decode_logprobs(steps_E, top.counts_T))
        error_E = np.abs(stored.logprobs_E.astype(np.float64) - top.logprobs_E)
        self.max_error_nats = max(self.max_error_nats, float(error_E.max()))
        self.losses.append(full.loss_of(stored))
        return Scores(sampled_T, top)


def settings() -> list[Setting]:
    """All settings of the table: fixed, then adaptive."""
    return [*map(Setting, FIXED), *(Setting(most, mass) for most in MOST for mass in MASSES)]


def score(teacher: ModelSource, rows: Sequence[PlannedRow], tried: Sequence[Setting]) -> None:
    """Run the teacher on `rows` once and give each chunk of full distributions to every setting."""
    model = teacher.load("float32").eval()
    with Progress("full distributions", len(rows), "rows") as progress:
        for row in rows:
            assert row.response_ids is not None
            ids_T = np.asarray(row.response_ids, np.int32)
            chunks: list[list[Scores]] = [[] for _ in tried]
            for part, full in full_distributions(model, row.prompt_ids, row.response_ids):
                table = full.top(max(FIXED))
                for setting, scores in zip(tried, chunks, strict=True):
                    scores.append(setting.take(full, table, ids_T[part]))
            text = teacher.decode(ids_T.tolist())
            for setting, scores in zip(tried, chunks, strict=True):
                whole = Scores.joined(scores)
                result = EngineResult(row.index, ids_T, row.finish_reason, whole.logprobs_T, whole.distributions)
                setting.rows.append((row, result, text))
            progress.advance()


def shards(setting: Setting, rows_per_shard: int) -> Iterator[bytes]:
    """The shard files of a cache with this setting."""
    for start in range(0, len(setting.rows), rows_per_shard):
        data, _ = encode_shard(to_table(setting.rows[start : start + rows_per_shard]), "", "reference")
        yield data


def measure(setting: Setting, rows_per_shard: int) -> dict[str, Any]:
    """One row of the table: sizes in bytes, losses in nats, means over positions."""
    loss = CutLoss.joined(setting.losses)
    entries = sum(len(kept(result).ids_E) for _, result, _ in setting.rows)
    num_bytes = sum(map(len, shards(setting, rows_per_shard)))
    positions = len(loss.kl_T)
    return {
        "setting": setting,
        "entries_per_position": entries / positions,
        "bytes_per_position": num_bytes / positions,
        "bytes_per_entry": num_bytes / entries,
        "mass_kept": float(loss.mass_kept_T.mean()),
        "kl": float(loss.kl_T.mean()),
        "kl_grid": float((loss.kl_T - loss.kl_cut_T).mean()),
        "max_error_nats": setting.max_error_nats,
    }


def kept(result: EngineResult) -> Distributions:
    """The entries of a result that has them."""
    assert result.distributions is not None
    return result.distributions


def column_bytes(setting: Setting, rows_per_shard: int) -> dict[str, int]:
    """Compressed bytes of each column over all shards, and of everything else in the files."""
    sizes: dict[str, int] = {}
    total = 0
    for data in shards(setting, rows_per_shard):
        total += len(data)
        group = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0)
        for index in range(group.num_columns):
            column = group.column(index)
            name = column.path_in_schema.split(".")[0]
            sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return dict(sorted(sizes.items(), key=lambda item: -item[1])) | {"(footer)": total - sum(sizes.values())}


def markdown(measured: Sequence[dict[str, Any]], facts: str, command: str, columns: dict[str, int]) -> str:
    """The page: provenance, the table, and the columns of one setting."""
    lines = [
        "# Size and loss of a cache",
        "",
        f"Made by `{command}`.",
        "",
        facts,
        "",
        "KL is KL(teacher || cache) in nats per position, the mean over positions, with the tail mass spread evenly "
        "over the tokens of the tail. *From the grid* is the part of it that comes from storing log-probs on a grid of "
        "1/128 nat. Bytes are those of whole shards, with ids, texts and sampled log-probs.",
        "",
        "| kept entries | entries per position | bytes per position | bytes per entry | kept mass | KL | from the grid "
        "| largest entry error |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in measured:
        name = ("top " if row["setting"].top_mass is None else "top mass ") + row["setting"].label
        lines.append(
            f"| {name} | {row['entries_per_position']:.1f} | {row['bytes_per_position']:.1f} "
            f"| {row['bytes_per_entry']:.3f} | {row['mass_kept']:.3f} | {row['kl']:.3f} | {row['kl_grid']:.1e} "
            f"| {row['max_error_nats']:.5f} |"
        )
    detailed = next(row for row in measured if row["setting"].label == DETAILED)
    total = sum(columns.values())
    lines += [
        "",
        f"Where the bytes of top {DETAILED} go:",
        "",
        "| column | bytes per entry | share |",
        "|---|---:|---:|",
    ]
    lines += [
        f"| `{name}` | {detailed['bytes_per_entry'] * size / total:.3f} | {size / total:.1%} |"
        for name, size in columns.items()
    ]
    return "\n".join([*lines, "", "![bytes per position against KL](cache-size.png)", ""])


def plot(measured: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Bytes per position against KL, both on log scales: one fixed line, and an adaptive line for each maximum."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = pyplot.subplots(figsize=(9, 6.5), dpi=150, facecolor="white")
    fixed = [row for row in measured if row["setting"].top_mass is None]
    draw_line(axes, fixed, "fixed top K", "#1b4f9c", "o", below=True)
    for most, colour, marker in zip(MOST, ("#c65d00", "#2a7f3f", "#8a2f8f"), "s^D", strict=True):
        part = [row for row in measured if row["setting"].top_mass is not None and row["setting"].top_k == most]
        draw_line(axes, part, f"top mass (labelled), at most {most} entries", colour, marker, below=False)
    axes.set(xscale="log", yscale="log", title=title)
    axes.set_xlabel("bytes per position (whole shards)")
    axes.set_ylabel("KL(teacher || cache), nats per position")
    for axis, ticks in ((axes.xaxis, (20, 50, 100, 200, 500)), (axes.yaxis, (0.1, 0.2, 0.3, 0.5, 0.7, 1.0))):
        axis.set_ticks(ticks)
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color="#dddddd", linewidth=0.8)
    axes.legend(frameon=False, loc="lower left")
    axes.margins(0.1)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def draw_line(axes: Any, part: Sequence[dict[str, Any]], name: str, colour: str, marker: str, *, below: bool) -> None:
    """A line with a label at every point, either below and left or above and right of it."""
    x, y = ([row[key] for row in part] for key in ("bytes_per_position", "kl"))
    axes.plot(x, y, "-" if below else "--", marker=marker, color=colour, label=name, linewidth=1.6, markersize=6)
    axes.plot(x, y, marker, color=colour, markersize=6, zorder=4)  # points above the labels' halos, lines below them
    for row in part:
        setting = row["setting"]
        axes.annotate(
            f"K={setting.top_k}" if setting.top_mass is None else f"{setting.top_mass:.2f}",
            (row["bytes_per_position"], row["kl"]),
            xytext=(-6, -5) if below else (5, 4),
            textcoords="offset points",
            ha="right" if below else "left",
            va="top" if below else "bottom",
            fontsize=9,
            color=colour,
            zorder=3,
            # a light halo keeps labels readable on top of lines
            bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
        )


def planned_rows(given: argparse.Namespace, teacher: ModelSource, config: CacheConfig) -> list[PlannedRow]:
    """The first reference answers of the data, planned as in `dpkd cache-teacher`."""
    encoder = PromptEncoder(teacher.tokenizer, given.template)
    plan = RowPlan(open_examples(given.data), encoder, config)
    return list(itertools.islice(plan.rows(Part("reference")), given.rows))


def main() -> None:
    """Score the references, make every setting's cache, and write the page and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="checkpoint directory")
    parser.add_argument("--data", required=True, help="rows with reference answers")
    parser.add_argument("--rows", type=int, default=128, help="rows to score, from the start of the data [128]")
    parser.add_argument("--template", choices=get_args(TemplateName), default="alpaca", help="prompt template [alpaca]")
    parser.add_argument("--rows-per-shard", type=int, default=128, help="rows per shard [128]")
    parser.add_argument("--out", type=Path, required=True, help="directory of the page and the plot")
    given = parser.parse_args()

    teacher = locate_model(given.teacher, "teacher")
    config = CacheConfig(
        teacher=given.teacher, data=given.data, out="-", responses="reference", template=given.template
    )
    rows, tried = planned_rows(given, teacher, config), settings()
    score(teacher, rows, tried)
    measured = [measure(setting, given.rows_per_shard) for setting in tried]

    positions, name = sum(len(row.response_ids or ()) for row in rows), Path(given.teacher).name
    facts = (
        f"{len(rows)} reference answers of `{given.data}` ({positions} positions, at most {config.max_new_tokens} "
        f"each), template {given.template}, teacher {name} in float32 ({teacher.vocab_size} tokens), shards of "
        f"{given.rows_per_shard} rows."
    )
    columns = column_bytes(next(setting for setting in tried if setting.label == DETAILED), given.rows_per_shard)
    page = markdown(measured, facts, f"python {' '.join(sys.argv)}", columns)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "cache-size.md").write_text(page, encoding="utf-8")
    plot(measured, f"Cache size against loss: {name}, {positions} positions", given.out / "cache-size.png")
    print(page)
    say(f"written: {given.out / 'cache-size.md'}, {given.out / 'cache-size.png'}")


if __name__ == "__main__":
    main()
