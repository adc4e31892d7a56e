"""Which initial student is best, before training and after it, at equal numbers of parameters.

    python benchmarks/student_starts.py --teacher models/smollm2-135m-instruct --out runs/student-starts --device cuda

For 24, 20, 16, 12 and 8 layers: students of the layers that each method chooses, and students of as many parameters
with fewer neurons or heads (`dpkd init-student --params`). Each is measured on held-out rows, trained with the default
objective, and measured again. All read the same rows in the same order. Every measurement is one line of
OUT/results.jsonl, and finished ones are skipped. `--jobs N` trains N students at once. The table is OUT/table.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from dpkd.core.devices import choose_device
from dpkd.core.errors import UserError
from dpkd.core.models import locate_model
from dpkd.distill import InitStudentConfig, TrainConfig, init_student, train
from dpkd.distill.student.calibration import rows_of_cache, with_teacher
from dpkd.distill.student.importance import Trials
from dpkd.distill.student.layers import spread_layers
from dpkd.distill.student.measures import batches_of, measure_model
from dpkd.distill.student.sizes import count_parameters, resized
from dpkd.teacher_cache.store.reader import TeacherCache

_METHODS = ("importance", "block influence", "angular distance", "spread", "last", "first")


def cache_teacher(options: argparse.Namespace, data: Path, limit: int, out: Path) -> None:
    """In a process of its own, which gives the device's memory back."""
    command = [
        sys.executable, "-m", "dpkd.pipelines.cli", "cache-teacher", "--teacher", str(options.teacher),
        "--data", str(data), "--out", str(out), "--engine", "auto", "--template", "chat", "--responses", "teacher",
        "--limit", str(limit), "--max-new-tokens", "96", "--top-k", "64", "--device", options.device,
    ]  # fmt: skip
    subprocess.run(command, check=True)


def layer_lists(options: argparse.Namespace) -> dict[str, dict[int, list[int]]]:
    """The layers that each method keeps, by method and number; kept in OUT/layers.json."""
    path = options.out / "layers.json"
    if path.is_file():
        return {
            name: {int(n): kept for n, kept in lists.items()} for name, lists in json.loads(path.read_text()).items()
        }
    source, device = locate_model(str(options.teacher), "teacher"), choose_device(options.device)
    model = source.load("float32").to(device).eval()
    rows = rows_of_cache(TeacherCache.open(options.cache), options.choose_rows)
    batches = with_teacher(model, list(batches_of(rows.choose, device)), len(source.tokenizer))
    trials = Trials(model, batches, len(source.tokenizer))
    num_layers = len(trials.layers)
    angles = layer_angles(trials, batches)
    influence = [1 - float(torch.cos(angles[layer, layer + 1]).mean()) for layer in range(num_layers)]
    by_influence = sorted(range(num_layers), key=lambda layer: influence[layer])
    lists: dict[str, dict[int, list[int]]] = {name: {} for name in _METHODS}
    by_importance = {len(removal.kept): list(removal.kept) for removal in trials.removals(min(options.layers))}
    for count in options.layers:
        removed = num_layers - count
        start = min(range(count + 1), key=lambda first: float(angles[first, first + removed].mean()))
        kept = (
            by_importance[count], sorted(by_influence[removed:]),
            [layer for layer in range(num_layers) if not start <= layer < start + removed],
            spread_layers(num_layers, count), [*range(removed, num_layers)], [*range(count)],
        )  # fmt: skip
        for name, layers in zip(_METHODS, kept, strict=True):
            lists[name][count] = layers
    path.write_text(json.dumps(lists))
    return lists


@torch.no_grad()
def layer_angles(trials: Trials, batches: list[Any]) -> dict[tuple[int, int], torch.Tensor]:
    """Angles between the hidden states before layer i and before layer j of every token, by (i, j)."""
    every = range(len(trials.layers))
    states_of = [
        [states[batch.attention_mask_BS.bool()] for states in trials.layer_inputs(every, batch)] for batch in batches
    ]
    states = [torch.cat(parts) for parts in zip(*states_of, strict=True)]
    pairs = itertools.combinations(range(len(states)), 2)
    return {(i, j): cosine_similarity(states[i], states[j], dim=1).clamp(-1, 1).arccos() for i, j in pairs}


def arms(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Options of `init_student` by the name of the student."""
    config = locate_model(str(options.teacher), "teacher").config
    lists, whole = layer_lists(options), count_parameters(config)
    num_layers = config.num_hidden_layers
    found: dict[str, dict[str, Any]] = {}
    for count in options.layers:
        found |= {f"{count} layers, {name}": {"keep": lists[name][count]} for name in _METHODS}
        # rounded up in the sixth digit: the share of exactly so many layers
        share = {"params": round(count_parameters(resized(config, count, None, None)) / whole + 5e-7, 6)}
        size = f"as {count} layers"
        found[f"{size}, best split"] = share
        for layers in (num_layers, (count + num_layers) // 2):
            narrow = {"layers": layers, "heads": config.num_attention_heads}
            found[f"{size}, {layers} layers with fewer neurons"] = share | narrow
    return {name: arm for name, arm in found.items() if any(text in name for text in options.only)}


def make(task: tuple[argparse.Namespace, str, dict[str, Any]]) -> dict[str, Any]:
    """Make one student and measure it."""
    options, name, arm = task
    out = options.out / "students" / slug(name)
    rows = {"cache": str(options.cache), "cache_rows": options.choose_rows}
    try:
        init_student(InitStudentConfig(teacher=str(options.teacher), out=out, device=options.device, **rows, **arm))
    except UserError as error:  # some splits do not exist for some teachers
        return {"student": name, "stage": "before", "error": str(error)}
    report = json.loads((out / "student.json").read_bytes())
    line = {"student": name, "stage": "before", "parameters": report["parameters"], "kept": report["kept"]}
    return line | measured(options, out)


def train_one(task: tuple[argparse.Namespace, str, int]) -> dict[str, Any]:
    """Train one student with one seed and measure it."""
    options, name, seed = task
    if not (options.out / "students" / slug(name)).is_dir():
        return {"student": name, "stage": stage(options), "seed": seed, "error": "no such student"}
    run = options.out / "runs" / f"{slug(name)}-{options.steps}-{seed}"
    started_s = time.perf_counter()
    train(
        TrainConfig(
            cache=str(options.cache), top_k=64, student=str(options.out / "students" / slug(name)), out=run, seed=seed,
            steps=options.steps, batch_size=options.batch_size, learning_rate=options.learning_rate, save_every=None,
            validation_examples=0, device=options.device, tracker="none",
        )
    )  # fmt: skip
    train_s = round(time.perf_counter() - started_s, 1)
    line = {"student": name, "stage": stage(options), "seed": seed, "train_s": train_s} | measured(options, run)
    shutil.rmtree(run)  # its weights are not needed again
    return line


def measured(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    held_out = options.out / "heldout"
    metrics = measure_model(str(directory), held_out, num_rows=options.measure_rows, device=options.device)
    return {key: metrics[key] for key in ("kl", "rkld", "top1_agreement", "perplexity")}


def stage(options: argparse.Namespace) -> str:
    return f"{options.steps} steps of {options.batch_size}, rate {options.learning_rate:g}"


def slug(name: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name).split())


def study(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All lines; those that OUT/results.jsonl has are not measured again."""
    path = options.out / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    chosen = arms(options)

    def done(name: str, at: str, seed: int | None = None) -> bool:
        return any((line["student"], line["stage"], line.get("seed")) == (name, at, seed) for line in results)

    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool, path.open("a", encoding="utf-8") as log:
        due = [(options, name, arm) for name, arm in chosen.items() if not done(name, "before")]
        runs = [
            (options, name, seed)
            for seed in options.seeds
            for name in chosen
            if options.steps and not done(name, stage(options), seed)
        ]
        for line in itertools.chain(pool.imap_unordered(make, due), pool.imap_unordered(train_one, runs)):
            results.append(line)
            log.write(json.dumps(line) + "\n")
            log.flush()
            print(json.dumps(line), flush=True)
            (options.out / "table.md").write_text(table(options, results) + "\n", encoding="utf-8")
    return results


def table(options: argparse.Namespace, results: list[dict[str, Any]]) -> str:
    """One row a student: before training, and the mean over seeds after it with the lowest and highest KL."""
    lines = [
        "| student | keeps | parameters | KL before | top-1 before | KL after | top-1 after | seeds |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    results = [line for line in results if "error" not in line]
    for before in (line for line in results if line["stage"] == "before"):
        after = [line for line in results if (line["student"], line["stage"]) == (before["student"], stage(options))]
        row = [before["student"], before["kept"], f"{before['parameters'] / 1e6:.1f}M"]
        row += [f"{before['kl']:.2f}", f"{before['top1_agreement']:.1%}"]
        if after:
            kls = [line["kl"] for line in after]
            spread = f" [{min(kls):.3f}, {max(kls):.3f}]" if len(kls) > 1 else ""
            agreement = sum(line["top1_agreement"] for line in after) / len(after)
            row += [f"{sum(kls) / len(kls):.3f}{spread}", f"{agreement:.1%}", str(len(after))]
        else:
            row += ["", "", "0"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="a Llama-like checkpoint directory")
    parser.add_argument("--out", type=Path, required=True, help="directory of caches, students and results")
    parser.add_argument("--data", type=Path, default=Path("examples/dolly/train.jsonl"), help="training rows")
    parser.add_argument("--cache", type=Path, help="a finished cache to train on, instead of --data")
    parser.add_argument("--heldout", type=Path, default=Path("examples/dolly/heldout.jsonl"), help="held-out rows")
    parser.add_argument("--rows", type=int, default=960, help="training rows to cache, at most")
    parser.add_argument("--measure-rows", type=int, default=96, help="held-out rows to measure on, at most")
    parser.add_argument("--choose-rows", type=int, default=64, help="cached rows: a quarter chooses what is kept")
    parser.add_argument("--layers", type=_ints, default=(24, 20, 16, 12, 8), help="numbers of layers, comma-separated")
    parser.add_argument("--only", nargs="*", default=[""], help="only students whose name contains one of these texts")
    parser.add_argument("--steps", type=int, default=100, help="training steps; 0: measure before training alone")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seeds", type=_ints, default=(0,), help="seeds of the order of rows, comma-separated")
    parser.add_argument("--jobs", type=int, default=1, help="students at once")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.cache is None:
        options.cache = options.out / "cache"
        cache_teacher(options, options.data, options.rows, options.cache)
    cache_teacher(options, options.heldout, options.measure_rows, options.out / "heldout")
    print(table(options, study(options)))


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
