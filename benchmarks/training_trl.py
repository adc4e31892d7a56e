"""dpkd's sequence-level step against TRL's `DPOTrainer` with precomputed reference log-probs, on the same pairs.

    pip install 'trl>=1.16,<1.17'
    python benchmarks/training_trl.py --cache DIR --round NAME --student DIR --teacher DIR [--steps 20]

Both train the student on the pairs of the cache and its round. TRL gets their texts, and the teacher as reference
model, whose log-probs it computes once before training. This is not part of its time, as building the cache is not part
of ours. The two take turns, block by block. Peak memory is measured by `--alone`, in a new process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import training_step

from dpkd.core.models import locate_model
from dpkd.distill.batches.order import BatchOrder
from dpkd.distill.rows.sources import CacheRows
from dpkd.distill.run.logs import peak_memory_bytes
from dpkd.teacher_cache.store.reader import TeacherCache

Block = Callable[[int, int], list[float]]


def ours(arguments: argparse.Namespace) -> Block:
    rows_of = training_step.batches(arguments)
    step = training_step.ours(arguments, {"objective": "dpkd", "level": "sequence", "round": arguments.round})

    def block(first: int, steps: int) -> list[float]:
        seconds = []
        for number in range(first, first + steps):
            started_s = time.perf_counter()
            step(rows_of(number))
            seconds.append(time.perf_counter() - started_s)
        return seconds

    return block


def trl(arguments: argparse.Namespace) -> Block:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Measures the time between the ends of two steps, including everything that the trainer does for a step."""

        def __init__(self) -> None:
            self.ends_s: list[float] = []

        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            self.ends_s.append(time.perf_counter())

    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    student, teacher = locate_model(arguments.student, "student"), locate_model(arguments.teacher, "teacher")
    model, reference = student.load("float32"), teacher.load("float32")
    rows = pairs(arguments)

    def block(first: int, steps: int) -> list[float]:
        size = arguments.batch_size
        with tempfile.TemporaryDirectory() as scratch:
            options = DPOConfig(
                output_dir=scratch, per_device_train_batch_size=size, max_steps=steps + 1, learning_rate=1e-5,
                precompute_ref_log_probs=True, precompute_ref_batch_size=size, use_cpu=True, bf16=False, fp16=False,
                gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
                logging_strategy="no", max_length=training_step.PADDED, beta=0.1, optim="adamw_torch_fused",
            )  # fmt: skip
            clock = Clock()
            start = (first * size) % max(len(rows) - (steps + 1) * size, 1)
            trainer = DPOTrainer(
                model=model,
                ref_model=reference,
                args=options,
                train_dataset=Dataset.from_list(rows[start : start + (steps + 1) * size]),
                processing_class=student.tokenizer,
                callbacks=[clock],
            )
            trainer.train()
        return [end - begin for begin, end in zip(clock.ends_s, clock.ends_s[1:], strict=False)]

    return block


def pairs(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """Texts of the pairs, in the order in which dpkd reads them."""
    cache = TeacherCache.open(arguments.cache)
    held = cache.round(arguments.round)
    shards = cache.shards("teacher")
    order = BatchOrder(CacheRows(cache, shards, held).group_sizes, 0, 1)
    made = []
    for number in range(order.num_rows):
        ((group, index),) = order.rows_of(number)
        drawn = cache.read_round(held, shards[group])
        shard = cache.read(shards[group])
        prompt, rejected = drawn.texts(index)
        _, chosen = shard.texts(shard.index_of[drawn.key(index)])
        made.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return made


ARMS = {"dpkd": ours, "trl-dpo": trl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("cache", "student", "teacher"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--round", default="r0", help="round of the cache [r0]")
    parser.add_argument("--steps", type=int, default=20, help="measured steps per block [20]")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs per step [8]")
    parser.add_argument("--blocks", type=int, default=2, help="turns of each variant [2]")
    parser.add_argument("--alone", choices=[*ARMS], help="run four steps of one variant and print its peak memory")
    given = parser.parse_args()
    if given.alone:
        ARMS[given.alone](given)(0, 4)
        print(json.dumps({"peak_MiB": peak_memory_bytes(torch.device("cpu")) // 2**20}))
        return
    arms = {name: make(given) for name, make in ARMS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(given.blocks):
        for name, block in arms.items():
            seconds[name] += block(number * given.steps, given.steps)
    print("| variant | s per step (median) | pairs/s | peak memory (MiB) |\n|---|---:|---:|---:|")
    for name, times in seconds.items():
        found = subprocess.run(
            [sys.executable, *sys.argv, "--alone", name], check=True, capture_output=True, text=True
        ).stdout
        peak = json.loads(found.splitlines()[-1])["peak_MiB"]
        median_s = statistics.median(times)
        print(f"| {name} | {median_s:.3f} | {given.batch_size / median_s:.2f} | {peak} |", flush=True)


if __name__ == "__main__":
    main()
