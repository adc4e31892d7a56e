"""Which initial student is best before training and after a few steps, with equal numbers of parameters.

    python benchmarks/student_starts.py --teacher models/smollm2-135m-instruct --out runs/student-starts

Caches the teacher on 160 training rows and 48 held-out rows (vLLM), makes every student with `init_student`, measures
it on held-out rows, trains it (token level with cross-entropy) and measures it again. All students read the same rows
in the same order. Finished work is skipped. The table is printed after every student, and its values are kept in OUT,
in one file for each choice of steps, batch size and seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpkd.core.models import locate_model
from dpkd.distill.options.student import InitStudentConfig
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.student.init import init_student
from dpkd.distill.student.measures import measure_student
from dpkd.distill.training import train
from dpkd.teacher_cache.store.reader import TeacherCache

_LAYERS = 8
_TRAINING: dict[str, Any] = {
    "level": "token", "sft_weight": 1.0, "learning_rate": 1e-3, "save_every": None, "device": "cpu",
}  # fmt: skip
_CPU = torch.device("cpu")


def cache_teacher(teacher: str, data: str, limit: int, rows_per_shard: int, out: Path) -> None:
    command = [
        sys.executable, "-m", "dpkd.pipelines.cli", "cache-teacher", "--teacher", teacher, "--data", data,
        "--out", str(out), "--engine", "vllm", "--template", "chat", "--responses", "teacher",
        "--set", f"limit={limit}", "--max-new-tokens", "64", "--top-k", "64",
        "--set", f"rows_per_shard={rows_per_shard}",
    ]  # fmt: skip
    subprocess.run(command, check=True)


def num_parameters(teacher: str, layers: int, width: int) -> int:
    config = AutoConfig.from_pretrained(teacher)
    config.num_hidden_layers, config.intermediate_size = layers, width
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def width_for(teacher: str, layers: int, parameters: int) -> int:
    """The number of neurons per MLP that gives `layers` layers about `parameters` parameters."""
    one = num_parameters(teacher, layers, 1)
    return 1 + round((parameters - one) / (num_parameters(teacher, layers, 2) - one))


def arms(teacher: str, out: Path) -> dict[str, dict[str, Any]]:
    config = AutoConfig.from_pretrained(teacher)
    num_layers, half = config.num_hidden_layers, config.num_hidden_layers // 2
    parameters = num_parameters(teacher, _LAYERS, config.intermediate_size)
    ends = [*range(_LAYERS - 2), num_layers - 2, num_layers - 1]
    config.num_hidden_layers = _LAYERS
    config.layer_types = None
    random_config = out / "random.json"
    random_config.write_text(json.dumps(config.to_dict()), encoding="utf-8")
    pruned = {"cache": str(out / "cache"), "cache_rows": 32}
    both = {"layers": half, "mlp_width": width_for(teacher, half, parameters)}
    return {
        f"{_LAYERS} layers, spread": {"layers": _LAYERS, "keep": "spread"},
        f"{_LAYERS} layers, first": {"layers": _LAYERS, "keep": "first"},
        f"{_LAYERS} layers, last": {"layers": _LAYERS, "keep": "last"},
        f"{_LAYERS} layers, list {','.join(map(str, ends))}": {"keep": ends},
        f"{half} layers spread, {both['mlp_width']} neurons": both | pruned,
        f"random, {_LAYERS} layers": {"from_config": random_config},
        f"{num_layers} layers, {(width := width_for(teacher, num_layers, parameters))} neurons": {"mlp_width": width}
        | pruned,
    }


def setting(training: dict[str, int]) -> str:
    return f"{training['steps']}x{training['batch_size']}-seed{training['seed']}"


def run_arm(
    teacher: str, out: Path, name: str, options: dict[str, Any], training: dict[str, int], num_rows: int
) -> dict[str, Any]:
    slug = "-".join("".join(letter if letter.isalnum() else " " for letter in name).split())
    heldout = TeacherCache.open(out / "heldout")
    student_dir = init_student(InitStudentConfig(teacher=teacher, out=out / slug / "student", **options))
    run_dir = out / slug / f"run-{setting(training)}"
    result: dict[str, Any] = {"start": name}
    result["parameters"] = json.loads((student_dir / "student.json").read_bytes())["parameters"]
    for stage, directory in (("before", student_dir), ("after", run_dir)):
        if stage == "after":
            started_s = time.perf_counter()
            train(TrainConfig(cache=out / "cache", student=str(student_dir), out=run_dir, **_TRAINING, **training))
            result["train_s"] = round(time.perf_counter() - started_s, 1)
            lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            result["step_s"] = sorted(line["step_time_s"] for line in lines)[len(lines) // 2]
            result["kl_by_step"] = [round(line["kld"], 3) for line in lines]
        source = locate_model(str(directory), "student")
        result[stage] = measure_student(source, source.load("float32"), heldout, num_rows, _CPU)
    return result


def table(results: list[dict[str, Any]]) -> str:
    titles = [
        "start", "parameters", "perplexity before", "KL before", "KL at 5", "KL at 10", "perplexity after", "KL after",
        "same top token",
    ]  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for row in results:
        before, after, by_step = row["before"], row["after"], row["kl_by_step"]
        lines.append(
            f"| {row['start']} | {row['parameters'] / 1e6:.1f}M | {before['perplexity']:.3g} | {before['kl']:.2f} "
            f"| {by_step[4]:.2f} | {by_step[9]:.2f} | {after['perplexity']:.0f} | {after['kl']:.3f} "
            f"| {after['top1_agreement']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a Llama-like checkpoint directory")
    parser.add_argument("--data", default="examples/dolly/train.jsonl", help="training rows")
    parser.add_argument("--heldout", default="examples/dolly/heldout.jsonl", help="held-out rows")
    parser.add_argument("--out", type=Path, required=True, help="directory of caches, students and runs")
    parser.add_argument("--steps", type=int, default=20, help="training steps [20]")
    parser.add_argument("--batch-size", type=int, default=4, help="rows per step [4]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of rows [0]")
    parser.add_argument("--measure-rows", type=int, default=24, help="held-out rows to measure on, at most 48 [24]")
    parser.add_argument(
        "--only", nargs="*", default=[""], help="only the students whose names contain one of these texts"
    )
    options = parser.parse_args()
    training = {"steps": options.steps, "batch_size": options.batch_size, "seed": options.seed}
    cache_teacher(options.teacher, options.data, 160, 32, options.out / "cache")
    cache_teacher(options.teacher, options.heldout, 48, 48, options.out / "heldout")
    kept_path = options.out / f"students-{setting(training)}.json"
    results = json.loads(kept_path.read_text()) if kept_path.is_file() else []
    for name, arm in arms(options.teacher, options.out).items():
        if name not in [row["start"] for row in results] and any(text in name for text in options.only):
            results.append(run_arm(options.teacher, options.out, name, arm, training, options.measure_rows))
            kept_path.write_text(json.dumps(results, indent=1), encoding="utf-8")
            print(table(results), flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
