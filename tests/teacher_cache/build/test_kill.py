"""A killed cache job resumes where it stopped, with the real engine and a real kill."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from support.commands import Command

from dpkd.teacher_cache.audit.verify import verify_cache
from dpkd.teacher_cache.store.reader import TeacherCache

pytestmark = pytest.mark.engine

COPIES = 3  # of 20 rows, in shards of 4: enough that the kill and the interrupt fall into the middle


def command(out: Path, teacher: Path, data: Path) -> list[str]:
    return [
        "cache-teacher", "--teacher", str(teacher), "--data", str(data), "--out", str(out), "--engine", "vllm",
        "--max-new-tokens", "160", "--top-k", "16", "--set", "rows_per_shard=4", "--set", "max_num_seqs=4",
    ]  # fmt: skip


def committed(out: Path) -> list[Path]:
    return sorted((out / "ledger").glob("[!.]*.json"))


def start_and_wait(arguments: list[str], out: Path, at_least: int) -> Command:
    process = Command(*arguments)
    deadline_s = time.monotonic() + 180
    while len(committed(out)) < at_least:
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    return process


def test_killed_and_interrupted_jobs_resume(tmp_path: Path, toy_teacher: Path, toy_data: Path) -> None:
    out = tmp_path / "cache"
    rows = [json.loads(line) for line in toy_data.read_text().splitlines()]
    data = tmp_path / "many.jsonl"
    data.write_text(
        "".join(json.dumps(row | {"id": f"{copy}-{row['id']}"}) + "\n" for copy in range(COPIES) for row in rows)
    )
    arguments = command(out, toy_teacher, data)

    process = start_and_wait(arguments, out, 2)
    process.kill()
    kept = {path.name: path.read_bytes() for path in committed(out)}
    assert not (out / "manifest.json").exists()

    process = start_and_wait(arguments, out, len(kept) + 2)
    process.send_signal(signal.SIGINT)
    done = process.finish()
    assert done.returncode == 130, done.stderr
    assert "run the same command again" in done.stderr
    for name, content in kept.items():
        assert (out / "ledger" / name).read_bytes() == content  # nothing committed was made again

    done = Command(*arguments).finish()
    assert done.returncode == 0, done.stderr
    verify_cache(out)
    cache = TeacherCache.open(out)
    seen = [cache.read(record).row(i).example_id for record in cache.shards() for i in range(record.rows)]
    assert sorted(seen) == sorted(f"{copy}-{row['id']}" for copy in range(COPIES) for row in rows)
    assert sorted(path.name for path in out.iterdir()) == ["dpkd.toml", "manifest.json", "shards"]
