"""`dpkd cache merge` and `cache filter` under SIGKILL: whatever the moment, the next run ends with the same bytes."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from support.commands import Command, dpkd
from support.toys import dolly_texts

from dpkd.core.errors import UserError
from dpkd.teacher_cache.audit.verify import verify_cache
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.reader import TeacherCache

KILLS = 3
SYNC_S = 0.03


def slow_disk() -> None:
    """Syncs take long, so that a kill finds files at every stage: written, renamed, recorded, listed in a manifest."""
    sync = os.fsync

    @functools.wraps(sync)
    def slow(descriptor: int) -> None:
        time.sleep(SYNC_S)
        sync(descriptor)

    os.fsync = slow


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory, toy_teacher: Path) -> list[Path]:
    """Two caches of references, with shards of two rows."""
    folder, made = tmp_path_factory.mktemp("parents"), []
    texts = dolly_texts("train")[:24]
    for name, part in (("first", texts[:13]), ("second", texts[13:])):
        data = folder / f"{name}.jsonl"
        rows = [{"id": f"{name}{i}", "instruction": text[:60], "output": text[60:160]} for i, text in enumerate(part)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        options: dict[str, Any] = {"responses": "reference", "engine": "transformers", "device": "cpu"}
        made.append(folder / name)
        build_cache(
            CacheConfig(
                teacher=str(toy_teacher), data=str(data), out=str(made[-1]), top_k=8, rows_per_shard=2, **options
            )
        )
    return made


def files(out: Path) -> dict[str, bytes]:
    """Every file of a finished cache."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def committed(out: Path) -> dict[str, bytes]:
    """The shards with a record in the ledger, which no later run may make again or lose."""
    records = [json.loads(path.read_bytes()) for path in (out / "ledger").glob("[!.]*.json")]
    return {record["path"]: (out / record["path"]).read_bytes() for record in records}


def killed_at_random(words: list[object], out: Path, draw: random.Random) -> bool:
    """Start the command and kill it soon after its next commit, or at any moment; False if it had finished."""
    before, process = len(committed(out)), Command(*words, prepare=slow_disk)
    deadline_s = time.monotonic() + 60
    if draw.random() < 0.3:
        time.sleep(draw.uniform(0, 0.5))
    else:
        while process.poll() is None and len(list((out / "ledger").glob("[!.]*.json"))) <= before:
            assert time.monotonic() < deadline_s
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 4 * SYNC_S))
    result = process.kill()
    assert result.returncode in (0, -9), result.stderr
    return result.returncode != 0


@pytest.mark.parametrize("command", ["merge", "merge in another order", "filter"])
def test_a_killed_command_ends_with_the_same_bytes(command: str, parents: list[Path], tmp_path: Path) -> None:
    ordered = parents[::-1] if command == "merge in another order" else parents
    words: list[object] = ["cache", "merge", *ordered] if command != "filter" else ["cache", "filter", parents[0]]
    rules = ["--max-tokens", "70"] if command == "filter" else []
    out = tmp_path / "out"
    assert dpkd(*words, "--out", out, *rules).returncode == 0
    expected = files(out)
    shutil.rmtree(out)
    draw, kills, kept = random.Random(command), 0, dict[str, bytes]()
    in_the_middle = 0
    while kills < KILLS and killed_at_random([*words, "--out", out, *rules], out, draw):
        kills += 1
        if (out / "manifest.json").exists():  # killed after the end, or a false "complete"
            break
        now = committed(out)
        in_the_middle += 0 < len(now) < len([name for name in expected if name.startswith("shards/")])
        assert {path: now.get(path) for path in kept} == kept
        kept = now
        with pytest.raises(UserError):
            TeacherCache.open(out)  # no reader takes it for a cache
    assert in_the_middle
    if command != "filter" and not (out / "manifest.json").exists():
        # the same caches in the other order are another cache: what is committed belongs to neither
        other = dpkd("cache", "merge", *ordered[::-1], "--out", out)
        assert other.returncode == 2, other.stderr
        assert committed(out) == kept
    done = Command(*words, "--out", out, *rules).finish()
    assert done.returncode == 0, done.stderr
    verify_cache(out)
    assert files(out) == expected
    assert all(expected[path] == data for path, data in kept.items())
    cache = TeacherCache.open(out)
    keys = [shard.key(i) for _, shard in cache.scan(cache.shards()) for i in range(len(shard))]
    assert len(keys) == len(set(keys)) == cache.manifest.counts["rows"]
    if command != "filter":
        assert {name for name, _ in keys} == {f"first{i}" for i in range(13)} | {f"second{i}" for i in range(11)}
