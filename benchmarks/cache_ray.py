"""Speed of two vLLM replicas on a local Ray cluster against one, with the toy teacher.

    python benchmarks/cache_ray.py

Each run is one `dpkd cache-teacher --engine ray` in a new process with a new local cluster. `s` is the time of the
whole command, including the start of Ray and of the replicas. `rows/s` is measured between a quarter and three quarters
of the commits, when all replicas are busy. A replica runs its engine with one thread. On two cores, two replicas leave
no core for the driver and Ray's own processes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cache_writing import make_toy, write_prompts


def rate_in_the_middle(out: Path, rows_per_shard: int) -> float:
    """Rows per second between a quarter and three quarters of the shards, from their modification times."""
    times_s = sorted(path.stat().st_mtime for path in (out / "shards").glob("*.parquet"))
    first, last = len(times_s) // 4, 3 * len(times_s) // 4
    return (last - first) * rows_per_shard / (times_s[last] - times_s[first])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="prompts [4096]")
    parser.add_argument("--rows-per-shard", type=int, default=16, help="rows per shard [16]")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest response in tokens [64]")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2], help="replicas of each run [1 2]")
    given = parser.parse_args()
    print("| replicas | rows/s | against one | s |\n|---:|---:|---:|---:|")
    # by default vLLM gives every replica all cores and binds their threads to the same ones
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
    }  # fmt: skip
    environment.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        teacher, data = make_toy(scratch), write_prompts(scratch / "prompts.jsonl", given.rows)
        rates: list[float] = []
        for replicas in given.replicas:
            out = scratch / f"cache-{replicas}"
            command = [
                sys.executable, "-m", "dpkd.pipelines.cli", "cache-teacher", "--teacher", str(teacher),
                "--data", str(data), "--out", str(out), "--engine", "ray", "--max-new-tokens",
                str(given.max_new_tokens), "--set", f"rows_per_shard={given.rows_per_shard}",
                "--set", f"ray_replicas={replicas}",
            ]  # fmt: skip
            started_s = time.perf_counter()
            subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
            taken_s = time.perf_counter() - started_s
            rates.append(rate_in_the_middle(out, given.rows_per_shard))
            print(f"| {replicas} | {rates[-1]:.0f} | {rates[-1] / rates[0]:.2f} | {taken_s:.0f} |", flush=True)


if __name__ == "__main__":
    main()
