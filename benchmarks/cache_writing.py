"""How much of vLLM's own speed remains while a cache is written, and the memory that this takes.

    python benchmarks/cache_writing.py speed --teacher models/smollm2-135m-instruct --rows 96 --max-new-tokens 96
    python benchmarks/cache_writing.py speed --teacher toy --rows 512 --max-new-tokens 64 --baseline flat
    python benchmarks/cache_writing.py memory

`speed` compares `LLM.generate` (without log-probs, or with the same flat ones) with everything from requests to
committed shards. They take turns on one engine, with the same prompts and seeds, without start-up. `memory` builds
caches of 1,000 and 10,000 prompts with a toy teacher, each in a new process, and prints the peak of each. The teacher
`toy` is a Llama with two layers, hidden size 64 and a byte-level BPE vocabulary of 600, made when the benchmark starts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples" / "dolly" / "train.jsonl"

if TYPE_CHECKING:
    from dpkd.teacher_cache.options.cache import CacheConfig


def make_toy(directory: Path) -> Path:
    """The toy teacher of the tests, saved to `directory`."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support import toys

    toys.train_tokenizer(directory / "tokenizer", toys.dolly_texts("train"), toys.VOCAB_SIZE)
    made: Path = toys.make_toy(directory / "toy", directory / "tokenizer", layers=2, seed=1)
    return made


def write_prompts(path: Path, rows: int) -> Path:
    """`rows` short prompts of examples/dolly, repeated with a number in front."""
    texts = [json.loads(line)["instruction"] for line in DATA.read_text(encoding="utf-8").splitlines()]
    texts = [text for text in texts if len(text) < 200]
    lines = [json.dumps({"id": f"p{i}", "instruction": f"{i}. {texts[i % len(texts)]}"}) for i in range(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def speed(arguments: argparse.Namespace, scratch: Path) -> None:
    from dpkd.core.models import locate_model
    from dpkd.core.prompts.sources import open_examples
    from dpkd.core.prompts.templates import PromptEncoder
    from dpkd.teacher_cache.build.plan import RowPlan
    from dpkd.teacher_cache.build.request import engine_options, sampling
    from dpkd.teacher_cache.build.survey import Part
    from dpkd.teacher_cache.engines.vllm.engine import VllmEngine
    from dpkd.teacher_cache.options.cache import CacheConfig

    teacher = make_toy(scratch) if arguments.teacher == "toy" else Path(arguments.teacher)
    config = CacheConfig(
        teacher=str(teacher),
        data=str(write_prompts(scratch / "prompts.jsonl", arguments.rows)),
        out=str(scratch / "cache"),
        engine="vllm",
        top_k=arguments.top_k,
        max_new_tokens=arguments.max_new_tokens,
        max_num_seqs=arguments.max_num_seqs,
        rows_per_shard=arguments.rows_per_shard,
    )
    model = locate_model(config.teacher, "teacher")
    encoder = PromptEncoder(model.tokenizer, config.template)
    rows = list(RowPlan(open_examples(str(config.data)), encoder, config).rows(Part("teacher")))
    drawn = sampling(config, model.stop_token_ids())
    bare_s, cached_s, num_tokens = [], [], []
    logprobs = arguments.top_k if arguments.baseline == "flat" else None
    with VllmEngine(model, engine_options(config)) as engine:
        for repeat in range(arguments.repeats + 1):
            arms: dict[str, Callable[[], tuple[float, int]]] = {
                "bare": partial(bare_generate, engine, rows, drawn, logprobs),
                "cached": partial(cached_generate, engine, model, rows, drawn, config, scratch / f"out-{repeat}"),
            }
            # the order alternates, so a machine that slows down favours neither
            taken = {name: arms[name]() for name in sorted(arms, reverse=repeat % 2 == 1)}
            if repeat:  # the first repeat is a warm-up
                bare_s.append(taken["bare"][0])
                cached_s.append(taken["cached"][0])
                num_tokens.append((taken["bare"][1], taken["cached"][1]))
    ratios = [b / c * nc / nb for b, c, (nb, nc) in zip(bare_s, cached_s, num_tokens, strict=True)]
    report = {
        "teacher": teacher.name,
        "rows": len(rows),
        "top_k": arguments.top_k,
        "baseline": arguments.baseline,
        "tokens": num_tokens[-1],
        "bare_tokens_per_s": round(statistics.median(n / s for s, (n, _) in zip(bare_s, num_tokens, strict=True)), 1),
        "cache_tokens_per_s": round(
            statistics.median(n / s for s, (_, n) in zip(cached_s, num_tokens, strict=True)), 1
        ),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }
    print(json.dumps(report, indent=2))


def bare_generate(engine: Any, rows: list[Any], drawn: Any, logprobs: int | None) -> tuple[float, int]:
    """Seconds and number of response tokens of `LLM.generate` on the rows."""
    from vllm import SamplingParams, TokensPrompt

    params = [
        SamplingParams(
            temperature=drawn.temperature,
            top_p=drawn.top_p,
            max_tokens=drawn.max_new_tokens,
            stop_token_ids=list(drawn.stop_token_ids),
            seed=row.seed,
            logprobs=logprobs,
            flat_logprobs=logprobs is not None,
            detokenize=False,
        )
        for row in rows
    ]
    prompts = [TokensPrompt(prompt_token_ids=list(row.prompt_ids)) for row in rows]
    started_s = time.perf_counter()
    outputs = engine._llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - started_s, sum(len(output.outputs[0].token_ids) for output in outputs)


def cached_generate(
    engine: Any, model: Any, rows: list[Any], drawn: Any, config: CacheConfig, out: Path
) -> tuple[float, int]:
    """Seconds and number of response tokens when the same rows become a finished cache."""
    from dpkd.core.progress import Progress
    from dpkd.teacher_cache.build.assembling import ShardLayout, fill
    from dpkd.teacher_cache.store.folders import open_folder
    from dpkd.teacher_cache.store.job import Job

    started_s = time.perf_counter()
    job = Job(open_folder(out), "teacher-cache", {"benchmark": out.name})
    with job.opened(config.to_toml(), {"teacher": len(rows)}), Progress("cache", len(rows), "rows") as progress:
        layout = ShardLayout("teacher", config.rows_per_shard, "teacher")
        fill(engine, model.decode, job, layout, rows, drawn, progress)
        manifest = job.finish([])
    return time.perf_counter() - started_s, manifest.counts["positions"]


def memory(arguments: argparse.Namespace, scratch: Path) -> None:
    """Print the peak resident memory of complete `dpkd cache-teacher` processes."""
    teacher = make_toy(scratch)
    print("| prompts | peak memory (MiB) | cache (MiB) | s |\n|---:|---:|---:|---:|")
    for rows in arguments.sizes:
        data = write_prompts(scratch / f"prompts-{rows}.jsonl", rows)
        out = scratch / f"cache-{rows}"
        command = [
            sys.executable, "-m", "dpkd.pipelines.cli", "cache-teacher", "--teacher", str(teacher), "--data", str(data),
            "--out", str(out), "--engine", arguments.engine, "--top-k", "64", "--max-new-tokens", "8",
        ]  # fmt: skip
        if arguments.engine == "vllm":
            # a small key-value cache: blocks of a large one are first used one after the other, which looks like a leak
            command += ["--engine-arg", "num_gpu_blocks_override=512"]
        started_s = time.perf_counter()
        # oneDNN keeps code for up to 1,024 matrix shapes, about 0.4 GiB, which is not what this measures
        environment = os.environ | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, status
        taken_s = time.perf_counter() - started_s
        cache_mib = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 2**20
        print(f"| {rows} | {usage.ru_maxrss / 1024:.0f} | {cache_mib:.1f} | {taken_s:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("speed", help="speed against LLM.generate")
    one.add_argument("--teacher", default="toy", help="checkpoint directory, or toy [toy]")
    one.add_argument("--rows", type=int, default=96, help="prompts [96]")
    one.add_argument("--max-new-tokens", type=int, default=96, help="longest response in tokens [96]")
    one.add_argument("--max-num-seqs", type=int, default=32, help="concurrent requests [32]")
    one.add_argument("--rows-per-shard", type=int, default=128, help="rows per shard [128]")
    one.add_argument("--top-k", type=int, default=64, help="kept entries per position [64]")
    one.add_argument("--repeats", type=int, default=5, help="measured repeats after a warm-up [5]")
    one.add_argument(
        "--baseline", choices=["plain", "flat"], default="plain", help="generate without or with log-probs [plain]"
    )
    two = commands.add_parser("memory", help="peak memory of complete jobs")
    two.add_argument("--sizes", type=int, nargs="+", default=[1000, 10000], help="prompts of each job [1000 10000]")
    two.add_argument("--engine", default="vllm", help="engine of the jobs [vllm]")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        {"speed": speed, "memory": memory}[given.command](given, Path(directory))


if __name__ == "__main__":
    main()
