"""The same runs on the CPU and on a CUDA device: losses, metrics and weights agree, in float32 and about in bfloat16.

    python benchmarks/cuda_check.py --out DIR

Builds a toy teacher, student, cache and round, trains every kind of objective for four steps on both devices, resumes
from a checkpoint on the device, and prints the largest relative difference of each run.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUNS: dict[str, dict[str, Any]] = {
    "dpkd-all": {},
    "dpkd-drawn": {"token_pairs": "drawn"},
    "released-code": {"token_pairs": "argmax", "beta": 0.1, "sft_weight": 0.5},
    "sequence": {"level": "sequence", "round": "r0"},
    "forward-kl": {"objective": "forward-kl"},
    "akl-uniform": {"objective": "akl", "tail": "uniform"},
    "jsd": {"objective": "jsd"},
    "minillm": {"objective": "minillm", "student_samples": "cached", "round": "r0"},
    "sft": {"objective": "sft"},
    "accumulated": {"batch_size": 2, "gradient_accumulation_steps": 2},
    "shared-prompts": {"level": "sequence", "round": "r0", "share_prompt": True},
    "checkpointed": {"gradient_checkpointing": True, "logits_chunk": 16},
    "lora": {"lora_rank": 4},
}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def largest_gap(run: Path, other: Path) -> tuple[float, str]:
    """Largest relative difference of losses and metrics, and where it is."""
    largest, where = 0.0, ""
    for one, two in zip(lines(run), lines(other), strict=True):
        for name, value in two.items():
            if name.endswith(("_s", "_bytes")) or not isinstance(value, float):
                continue
            gap = abs(one[name] - value) / max(abs(value), 1e-2)
            if gap > largest or math.isnan(gap):
                largest, where = gap, f"{name} of step {two['step']}"
    return largest, where


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the check; it is emptied")
    parser.add_argument("--device", default="cuda", help="the other device; cpu tries the check itself")
    arguments = parser.parse_args()
    out, other = arguments.out, arguments.device
    sys.path.insert(0, str(ROOT / "tests"))
    from support import toys

    from dpkd.distill import TrainConfig, train
    from dpkd.teacher_cache import CacheConfig, build_cache

    shutil.rmtree(out, ignore_errors=True)
    toys.train_tokenizer(out / "tokenizer", toys.dolly_texts("train"), toys.VOCAB_SIZE)
    teacher = toys.make_toy(out / "teacher", out / "tokenizer", layers=2, seed=1)
    student = toys.make_toy(out / "student", out / "tokenizer", layers=1, seed=2)
    data = toys.write_toy_data(out / "rows.jsonl")
    caches = {}
    for device in dict.fromkeys(("cpu", other)):
        options: dict[str, Any] = {
            "out": str(out / f"cache-{device}"), "teacher": str(teacher), "engine": "transformers", "top_k": 32,
            "max_new_tokens": 16, "template": "chat", "device": device, "temperature": 0.0,
        }  # fmt: skip
        build_cache(CacheConfig(data=str(data), responses="both", **options))
        build_cache(CacheConfig(student=str(student), round="r0", **options))
        caches[device] = options["out"]
    print("| run | float32, largest relative difference | where | bfloat16 | where |\n|---|---:|---|---:|---|")
    for name, options in RUNS.items():
        common = {"cache": caches["cpu"], "student": str(student), "steps": 4, "batch_size": 4, "tracker": "none"}
        runs = {}
        for device, dtype in (("cpu", "float32"), (other, "float32"), (other, "bfloat16")):
            key = f"{name}-{device}-{dtype}"
            config = TrainConfig(out=out / key, device=device, dtype=dtype, **(common | options))  # type: ignore[arg-type]
            runs[device, dtype] = train(config)
        gaps = [largest_gap(runs[other, dtype], runs["cpu", "float32"]) for dtype in ("float32", "bfloat16")]
        print(
            "| " + " | ".join([name, *(text for gap, where in gaps for text in (f"{gap:.1e}", where))]) + " |",
            flush=True,
        )
    stopped = TrainConfig(
        out=out / "stopped", cache=caches[other], student=str(student), steps=6, batch_size=4, save_every=3,
        tracker="none", device=other, validation_examples=3, best_metric="kld",
    )  # fmt: skip
    started_s = time.perf_counter()
    run = train(stopped)
    again = Path(shutil.copytree(run, out / "again"))
    for file in ("run.json", "model.safetensors", "config.json"):
        (again / file).unlink()
    train(stopped.model_copy(update={"out": again}))
    print(f"resumed on the device: {largest_gap(again, run)}, {time.perf_counter() - started_s:.1f} s")


if __name__ == "__main__":
    main()
