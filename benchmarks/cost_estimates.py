"""How near `dpkd cache-teacher --dry-run` and `dpkd plan` are to the real jobs: estimate, then run, on one machine.

    python benchmarks/cost_estimates.py --teacher models/smollm2-135m-instruct [--recipe quickstart]

Needs an idle machine: an estimate cannot know what else will run. Each line has the estimate, the real figure and their
ratio. The caches differ in what decides their cost: lengths, batch, references, a fuller engine than the pilot's.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from dpkd.pipelines.planning.measure import plan_recipe
from dpkd.pipelines.planning.processes import estimate, in_child, timed
from dpkd.pipelines.recipe.format import read_recipe
from dpkd.pipelines.recipe.shipped import find_recipe
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.reader import TeacherCache

DATA = Path(__file__).parents[1] / "examples" / "dolly" / "train.jsonl"
JOBS: dict[str, dict[str, Any]] = {
    "teacher responses": {"limit": 160, "max_new_tokens": 96},
    "short responses, large batch": {"limit": 320, "max_new_tokens": 32, "max_num_seqs": 128},
    "references": {"limit": 160, "max_new_tokens": 128, "responses": "reference"},
    "transformers engine": {"limit": 96, "max_new_tokens": 48, "engine": "transformers"},
}


def report(name: str, estimated: float, actual: float, unit: str) -> None:
    print(f"{name:<45} {estimated:10.1f} {actual:10.1f} {unit:<3} {estimated / actual:6.2f}", flush=True)


def caches(teacher: str, directory: Path) -> None:
    for name, options in JOBS.items():
        out = directory / name.replace(" ", "-")
        config = CacheConfig(
            teacher=teacher, data=str(DATA), out=str(out), template="chat", rows_per_shard=32, dry_run=True, **options
        )
        cost = in_child(estimate, config, None)
        taken_s = in_child(timed, "cache-teacher", config.model_copy(update={"dry_run": False}))
        counts = TeacherCache.open(out).manifest.counts
        report(f"{name}: time", cost.seconds, taken_s, "s")
        report(f"{name}: disk", cost.num_bytes / 1e6, counts["bytes"] / 1e6, "MB")
        if generated := sum(phase.generated for phase in cost.phases):
            report(f"{name}: tokens", generated, counts["positions"], "")


def recipe(name: str, teacher: str, directory: Path) -> None:
    name = str(find_recipe(name).resolve())
    inputs = {"teacher": str(Path(teacher).resolve())}
    os.chdir(directory)
    planned, costs = plan_recipe(name, inputs, 32)
    steps = read_recipe(name, inputs)
    total, actual = 0.0, 0.0
    for item, cost, step in zip(planned, costs, steps, strict=True):
        taken_s = in_child(timed, step.command, step.config)
        report(f"{name.rpartition('/')[2]}: {item.step.title}", cost.seconds or 0.0, taken_s, "s")
        total, actual = total + (cost.seconds or 0.0), actual + taken_s
    report(f"{name.rpartition('/')[2]}: all steps", total, actual, "s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--recipe", help="plan and run this recipe instead of single caches")
    args = parser.parse_args()
    started_s = time.monotonic()
    print(f"{'':<45} {'estimate':>10} {'real':>10}     ratio")
    with tempfile.TemporaryDirectory() as directory:
        if args.recipe:
            recipe(args.recipe, args.teacher, Path(directory))
        else:
            caches(str(Path(args.teacher).resolve()), Path(directory))
    print(f"took {time.monotonic() - started_s:.0f} s")


if __name__ == "__main__":
    main()
