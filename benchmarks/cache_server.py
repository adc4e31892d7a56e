"""Speed of writing a cache with a vLLM HTTP server on loopback, against vLLM in the job's own process.

    python benchmarks/cache_server.py

Both take turns and do everything from requests to committed shards, with the same prompts and seeds on the toy teacher,
without start-up. The server's three processes (HTTP, engine, worker) share the cores with the job, so the ratio is a
worst case. The report therefore also has two figures that do not depend on this. Response tokens per second of the
job's processor time limit what one job can take from any number of servers. The same of the server's HTTP process,
which writes every log-prob as JSON, limits what one server can give.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from cache_writing import ROOT, cached_generate, make_toy, write_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="prompts [256]")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest response in tokens [64]")
    parser.add_argument("--max-num-seqs", type=int, default=32, help="concurrent requests [32]")
    parser.add_argument("--top-k", type=int, default=64, help="kept entries per position [64]")
    parser.add_argument("--repeats", type=int, default=3, help="measured repeats after a warm-up [3]")
    given = parser.parse_args()
    # one thread each, not bound to a core; the test server sets one thread by itself
    unbound = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"OMP_NUM_THREADS": "1"} | unbound
    sys.path.insert(0, str(ROOT / "tests"))
    import psutil
    from support.vllm_servers import VllmServer

    from dpkd.core.models import locate_model
    from dpkd.core.prompts.sources import open_examples
    from dpkd.core.prompts.templates import PromptEncoder
    from dpkd.teacher_cache.build.plan import RowPlan
    from dpkd.teacher_cache.build.request import engine_options, sampling
    from dpkd.teacher_cache.build.survey import Part
    from dpkd.teacher_cache.engines.open import open_engine
    from dpkd.teacher_cache.options.cache import CacheConfig

    with tempfile.TemporaryDirectory() as directory, ExitStack() as running:
        scratch = Path(directory)
        config = CacheConfig(
            teacher=str(make_toy(scratch)),
            data=str(write_prompts(scratch / "prompts.jsonl", given.rows)),
            out=str(scratch / "cache"),
            top_k=given.top_k,
            max_new_tokens=given.max_new_tokens,
            max_num_seqs=given.max_num_seqs,
        )
        model = locate_model(config.teacher, "teacher")
        encoder = PromptEncoder(model.tokenizer, config.template)
        rows = list(RowPlan(open_examples(str(config.data)), encoder, config).rows(Part("teacher")))
        drawn = sampling(config, model.stop_token_ids())
        options = engine_options(config)
        # as many concurrent requests as the engine in this process
        arguments = ["--max-num-seqs", str(given.max_num_seqs)]
        server = running.enter_context(VllmServer(model.path, arguments=arguments, environment=unbound, forked=False))
        watched = {"job": psutil.Process(), "http": psutil.Process().children()[0]}
        engines = {
            "server": running.enter_context(open_engine("server", model, replace(options, server_urls=(server.url,)))),
            "in_process": running.enter_context(open_engine("vllm", model, options)),
        }
        rates: dict[str, list[float]] = {name: [] for name in engines}
        tokens: dict[str, int] = {}
        spent_s = dict.fromkeys(watched, 0.0)
        for repeat in range(given.repeats + 1):
            # the order alternates, so a machine that slows down favours neither
            for name in sorted(engines, reverse=repeat % 2 == 1):
                out = scratch / f"{name}-{repeat}"
                before_s = {role: sum(process.cpu_times()[:2]) for role, process in watched.items()}
                taken_s, tokens[name] = cached_generate(engines[name], model, rows, drawn, config, out)
                if repeat:  # the first repeat is a warm-up
                    rates[name].append(len(rows) / taken_s)
                if repeat and name == "server":
                    for role, process in watched.items():
                        spent_s[role] += sum(process.cpu_times()[:2]) - before_s[role]
    ratios = [over / inside for over, inside in zip(rates["server"], rates["in_process"], strict=True)]
    report = {
        "rows": len(rows),
        "top_k": given.top_k,
        "tokens": tokens,
        "rows_per_s": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "ratio_median": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "tokens_per_cpu_s": {role: round(tokens["server"] * given.repeats / value) for role, value in spent_s.items()},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
