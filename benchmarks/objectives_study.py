"""Which objective distils best: every arm from the same start, cache and number of steps, on held-out data.

    python benchmarks/objectives_study.py --teacher DIR --data TRAIN.jsonl --eval-data HELDOUT.jsonl --out DIR

One arm is one objective with its options. Each arm trains with every learning rate for the first seed; the rate with
the lowest KL(teacher || student) on held-out rows of the cache is kept, and the arms of `--finalists` train with the
other seeds too. Answers are sampled at temperature 1 and scored by Rouge-L, as `dpkd eval` does. Every result is one
line of OUT/results.jsonl, and finished work is skipped, so that a stopped study continues. `--jobs N` runs N arms at
once. The table at the end has means over seeds, 95% bootstrap intervals over rows, and the paired difference from
forward KL.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np

ARMS: dict[str, dict[str, Any]] = {
    "sft": {"objective": "sft", "responses": "reference"},
    "seqkd": {"objective": "seqkd"},
    "kd": {"objective": "kd"},
    **{
        name: {"objective": name}
        for name in ("forward-kl", "reverse-kl", "jeffreys", "jsd", "akl", "tvd", "alpha-beta")
    },
    "skewed-forward-kl": {"objective": "skewed-forward-kl"},
    "skewed-reverse-kl": {"objective": "skewed-reverse-kl"},
    "dpkd-all": {"token_pairs": "all", "beta": 1.0},
    "dpkd-all-beta0.1": {"token_pairs": "all", "beta": 0.1},
    "dpkd-all-beta4": {"token_pairs": "all", "beta": 4.0},
    "dpkd-drawn": {"token_pairs": "drawn", "beta": 1.0},
    "dpkd-argmax": {"token_pairs": "argmax", "beta": 0.1},
    "dpkd-argmax-mix": {"token_pairs": "argmax", "beta": 0.1, "dpkd_weight": 0.5, "sft_weight": 0.5},
    "dpkd-argmax-kl": {"token_pairs": "argmax", "beta": 0.1, "dpkd_weight": 0.5, "kd_weight": 0.5},
}


def run_arm(arguments: argparse.Namespace, arm: str, rate: float, seed: int, *, scored: bool) -> dict[str, Any]:
    """Train one arm and measure it on held-out rows of the cache; with `scored` also its answers by Rouge-L."""
    from dpkd.distill import TrainConfig, train
    from dpkd.evaluate import EvalConfig, evaluate

    out = arguments.out / "runs" / f"{arm}-{rate:g}-{seed}"
    started_s = time.perf_counter()
    options = {"responses": "teacher"} | ARMS[arm]
    config = TrainConfig(
        cache=str(arguments.cache or arguments.out / "cache"),
        student=str(arguments.student or arguments.out / "student"),
        out=out,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=rate,
        seed=seed,
        validation_examples=arguments.validation_examples,
        validate_every=arguments.steps,
        save_every=None,
        device=arguments.device,
        tracker="none",
        **options,
    )
    train(config)
    lines = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    names = ("kld", "rkld", "entropy", "top1_agreement")
    result = {"arm": arm, "rate": rate, "seed": seed, "seconds": round(time.perf_counter() - started_s, 1)}
    result |= {name: lines[-1][name] for name in names} | {"start_kld": lines[0]["kld"]}
    if scored:
        report = evaluate(eval_config(EvalConfig, arguments, arm, out, out / "eval"))
        result |= rouge_of(report)
    return result


def eval_config(kind: Any, arguments: argparse.Namespace, name: str, model: Path, out: Path) -> Any:
    return kind(
        model={name: str(model)},
        data={"heldout": str(arguments.eval_data)},
        out=out,
        limit=arguments.eval_rows,
        template="chat",
        seeds=(10, 20),
        max_new_tokens=arguments.max_new_tokens,
        max_num_seqs=256,
        engine="auto",
        device=arguments.device,
        perplexity=False,
        num_sign_flips=200,
    )


def rouge_of(report: Path) -> dict[str, Any]:
    """Mean Rouge-L of every row over the generation seeds, in the order of the rows, and the answers' mean length."""
    import pyarrow.parquet as pq

    table = pq.read_table(report.parent / "per_example.parquet").to_pylist()
    by_row: dict[str, list[float]] = {}
    for row in table:
        by_row.setdefault(row["example_id"], []).append(row["rouge_l"])
    rows = [round(float(np.mean(by_row[name])), 3) for name in sorted(by_row)]
    return {"rouge_l": float(np.mean(rows)), "rouge_rows": rows}


def work(task: tuple[argparse.Namespace, str, float, int, bool]) -> dict[str, Any]:
    arguments, arm, rate, seed, scored = task
    try:
        return run_arm(arguments, arm, rate, seed, scored=scored)
    except Exception as error:  # one arm that cannot run must not end the study: its line says why
        return {"arm": arm, "rate": rate, "seed": seed, "error": f"{type(error).__name__}: {error}"[:300]}


def prepare(arguments: argparse.Namespace) -> None:
    from dpkd.distill import InitStudentConfig, init_student
    from dpkd.evaluate import EvalConfig, evaluate
    from dpkd.teacher_cache import CacheConfig, build_cache

    if arguments.cache is None:
        build_cache(
            CacheConfig(
                teacher=str(arguments.teacher),
                data=str(arguments.data),
                out=str(arguments.out / "cache"),
                limit=arguments.rows,
                responses="both",
                template="chat",
                top_k=64,
                max_new_tokens=arguments.max_new_tokens,
                engine="auto",
                max_num_seqs=128,
                device=arguments.device,
            )
        )
    if arguments.student is None:
        init_student(
            InitStudentConfig(teacher=str(arguments.teacher), out=arguments.out / "student", keep=arguments.keep)
        )
    path = arguments.out / "references.json"
    if not path.is_file():
        student = arguments.student or arguments.out / "student"
        measured = {
            name: rouge_of(evaluate(eval_config(EvalConfig, arguments, name, model, arguments.out / f"eval-{name}")))
            for name, model in (("teacher", arguments.teacher), ("start", student))
        }
        path.write_text(json.dumps(measured))


def study(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All results; those that OUT/results.jsonl has are not computed again."""
    path = arguments.out / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    results = [line for line in results if "error" not in line]
    context = multiprocessing.get_context("spawn")
    with context.Pool(arguments.jobs) as pool, path.open("a", encoding="utf-8") as log:

        def run_all(tasks: list[tuple[str, float, int]], *, scored: bool) -> None:
            done = {(line["arm"], line["rate"], line["seed"]) for line in results if not scored or "rouge_l" in line}
            due = [(arguments, *task, scored) for task in tasks if task not in done]
            for result in pool.imap_unordered(work, due):
                results.append(result)
                log.write(json.dumps(result) + "\n")
                log.flush()
                shown = {key: value for key, value in result.items() if key != "rouge_rows"}
                print(json.dumps(shown), flush=True)

        first, *others = arguments.seeds
        run_all([(arm, rate, first) for arm in arguments.arms for rate in arguments.rates], scored=False)
        best = {arm: best_rate(results, arm, first) for arm in arguments.arms}
        best = {arm: rate for arm, rate in best.items() if rate is not None}
        run_all([(arm, rate, first) for arm, rate in best.items()], scored=True)
        run_all([(arm, best[arm], seed) for seed in others for arm in arguments.finalists if arm in best], scored=True)
    return results


def best_rate(results: list[dict[str, Any]], arm: str, seed: int) -> float | None:
    """The learning rate with the lowest held-out KL; None if no run of the arm ended."""
    found = [line for line in results if line["arm"] == arm and line["seed"] == seed and "kld" in line]
    return min(found, key=lambda line: line["kld"])["rate"] if found else None


def table(arguments: argparse.Namespace, results: list[dict[str, Any]]) -> str:
    scored: dict[str, list[dict[str, Any]]] = {}
    for line in results:
        if "rouge_l" in line:
            scored.setdefault(line["arm"], []).append(line)
    references = json.loads((arguments.out / "references.json").read_text())
    draws = np.random.default_rng(0)
    rows_of = {arm: np.mean([line["rouge_rows"] for line in lines], axis=0) for arm, lines in scored.items()}

    def interval(values: np.ndarray) -> str:
        resampled = values[draws.integers(0, len(values), (5000, len(values)))].mean(axis=1)
        low, high = np.percentile(resampled, [2.5, 97.5])
        return f"{values.mean():+.2f} [{low:+.2f}, {high:+.2f}]"

    lines = [
        f"teacher {references['teacher']['rouge_l']:.2f}, student before training {references['start']['rouge_l']:.2f}",
        "",
        "| arm | rate | seeds | KL(p, q) | KL(q, p) | entropy | top-1 | Rouge-L | less forward KL |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm in sorted(scored, key=lambda arm: -float(np.mean(rows_of[arm]))):
        of_arm = scored[arm]
        means = [np.mean([line[name] for line in of_arm]) for name in ("kld", "rkld", "entropy", "top1_agreement")]
        figures = " | ".join(f"{value:.3f}" for value in means)
        against = interval(rows_of[arm] - rows_of["forward-kl"]) if "forward-kl" in rows_of else ""
        lines.append(
            f"| {arm} | {of_arm[0]['rate']:g} | {len(of_arm)} | {figures} | {rows_of[arm].mean():.2f} | {against} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="checkpoint of the teacher")
    parser.add_argument("--data", type=Path, help="rows to cache, if --cache is not given")
    parser.add_argument("--eval-data", type=Path, required=True, help="held-out rows with references")
    parser.add_argument("--out", type=Path, required=True, help="directory of the study")
    parser.add_argument("--cache", type=Path, help="a finished cache; none: OUT/cache is built from --data")
    parser.add_argument("--student", type=Path, help="the start of every arm; none: OUT/student by --keep")
    parser.add_argument("--keep", default="0,1,2,3,4,5,6,7,8,9,16,17,18,19,20,21,22,23,24,25,26,27,28,29")
    parser.add_argument("--rows", type=int, default=2000, help="rows to cache")
    parser.add_argument("--eval-rows", type=int, default=200, help="held-out rows to answer")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="longest response and answer, in tokens")
    parser.add_argument("--validation-examples", type=int, default=96, help="examples of the cache to hold out")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of a run")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step")
    parser.add_argument("--rates", type=_floats, default=(1e-4, 3e-4, 1e-3), help="learning rates, comma-separated")
    parser.add_argument("--seeds", type=_ints, default=(0, 1, 2), help="training seeds, comma-separated")
    parser.add_argument("--arms", type=_texts, default=tuple(ARMS), help="arms, comma-separated")
    parser.add_argument("--finalists", type=_texts, default=tuple(ARMS), help="arms that all seeds train")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    prepare(arguments)
    text = table(arguments, study(arguments))
    (arguments.out / "table.md").write_text(text + "\n")
    print(text)


def _texts(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


if __name__ == "__main__":
    main()
