"""What `kill -9` costs a cache: kill one job at random moments and start it again, a given number of times.

    python benchmarks/cache_kills.py --kills 20

The job is `dpkd cache-teacher --engine transformers` on the toy teacher, each time in a new process. Kills can hit any
moment of the job, start-up included: one in five comes after a random wait from the start, the others after a random
wait from the next commit. The report has the kills that hit a running job, the committed shards that were lost or
changed by a kill, the missing and duplicated rows of the finished cache, and the result of `verify`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cache_writing import make_toy, write_prompts


def committed(out: Path) -> dict[str, str]:
    """sha256 of every committed shard, by path."""
    found = [json.loads(path.read_bytes()) for path in (out / "ledger").glob("[!.]*.json")]
    return {record["path"]: record["sha256"] for record in found}


def changed(out: Path, kept: dict[str, str]) -> int:
    """Number of shards of `kept` that are gone or changed."""
    now = committed(out)
    return sum(now.get(path) != digest or digest != digest_of(out / path) for path, digest in kept.items())


def digest_of(file: Path) -> str | None:
    """sha256 of a file; None if it does not exist."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def kill_once(command: list[str], out: Path, draw: random.Random) -> bool:
    """Start the job and kill it at a random moment; False if it had already finished."""
    before = len(committed(out))
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    if draw.random() < 0.2:
        time.sleep(draw.uniform(0, 6))
    else:
        while process.poll() is None and len(committed(out)) == before:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.4))
    process.kill()
    return process.wait() != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of kills [20]")
    parser.add_argument(
        "--rows", type=int, help="prompts; enough that the job does not finish before the last kill [100 per kill]"
    )
    parser.add_argument("--rows-per-shard", type=int, default=8, help="rows per shard [8]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments [0]")
    given = parser.parse_args()
    num_rows = given.rows or 100 * given.kills
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from dpkd.core.errors import UserError
    from dpkd.teacher_cache.audit.verify import verify_cache
    from dpkd.teacher_cache.store.reader import TeacherCache

    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        teacher, data = make_toy(scratch), write_prompts(scratch / "prompts.jsonl", num_rows)
        out = scratch / "cache"
        command = [
            sys.executable, "-m", "dpkd.pipelines.cli", "cache-teacher", "--teacher", str(teacher), "--data", str(data),
            "--out", str(out), "--engine", "transformers", "--max-new-tokens", "24", "--top-k", "16",
            "--set", f"rows_per_shard={given.rows_per_shard}",
        ]  # fmt: skip
        started_s = time.perf_counter()
        kills = lost_shards = 0
        kept: dict[str, str] = {}
        while kills < given.kills and kill_once(command, out, draw):
            kills += 1
            lost_shards += changed(out, kept)
            kept = committed(out)
        at_the_last_kill = len(kept)
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        cache = TeacherCache.open(out)
        final = {record.path: record.sha256 for record in cache.manifest.shards}
        lost_shards += sum(final.get(path) != digest for path, digest in kept.items())
        keys = [shard.key(index) for _, shard in cache.scan(cache.shards()) for index in range(len(shard))]
        try:
            verified = f"no problem found: {verify_cache(out)}"
        except UserError as error:
            verified = str(error)
        report = {
            "kills": kills,
            "shards": len(final),
            "shards_committed_at_the_last_kill": at_the_last_kill,
            "committed_shards_lost_or_changed": lost_shards,
            "rows": len(keys),
            "rows_lost": len({(f"p{i}", 0) for i in range(num_rows)} - set(keys)),
            "rows_duplicated": len(keys) - len(set(keys)),
            "left_over_files": sorted(
                path.name for path in out.iterdir() if path.name not in ("dpkd.toml", "manifest.json", "shards")
            ),
            "verify": verified,
            "s": round(time.perf_counter() - started_s),
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
