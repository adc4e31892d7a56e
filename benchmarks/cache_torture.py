"""Random faults over one job, by seed: what they cost a cache on a disk and in an object store.

    python benchmarks/cache_torture.py --faults 200 --seed 1
    python benchmarks/cache_torture.py --faults 200 --seed 1 --store s3

The job is `dpkd cache-teacher --engine transformers` on the toy teacher, each time in a new process. Faults before its
end: SIGKILL, SIGSTOP and SIGCONT with a second job in between, two jobs at once, a shard cut, emptied, removed or with
a flipped bit while no job runs or while it is stopped, a ledger record removed, a lock that a machine with another
clock renews, a lock that is lost, a data file that changes.
Faults after its end: shards cut, emptied, flipped or removed, and a repair that is killed. After each fault the script
compares every committed shard with a cache that was built in one go; a repaired cache must equal it byte for byte, with
its manifest. Then the job starts anew. The object store is an S3 server (moto) on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from cache_writing import ROOT, make_toy, write_prompts

sys.path.insert(0, str(ROOT / "tests"))

from support.commands import PRELOAD, Command

from dpkd.core.errors import UserError
from dpkd.core.progress import say
from dpkd.teacher_cache.audit.verify import verify_cache
from dpkd.teacher_cache.store.folder import MANIFEST, Folder
from dpkd.teacher_cache.store.folders import open_folder
from dpkd.teacher_cache.store.locks import LOCK

ROWS_PER_SHARD = 2
TIMEOUT_S = 300.0


class Torture:
    """One job and its faults.

    `findings` are the violations: a committed shard that was lost or changed, a cache called complete that is not the
    reference, a second writer, an error that was not one line with exit code 2.
    """

    def __init__(self, out: str, scratch: Path, seed: int, rows: int) -> None:
        self.folder, self.out, self.draw = open_folder(out), out, random.Random(seed)
        self.data = write_prompts(scratch / "prompts.jsonl", rows)
        self.words = [
            "cache-teacher", "--teacher", str(make_toy(scratch)), "--data", str(self.data), "--out", out,
            "--engine", "transformers", "--max-new-tokens", "8", "--top-k", "8", "--seed", "3",
            "--set", f"rows_per_shard={ROWS_PER_SHARD}",
            "--set", "max_num_seqs=1",  # the last bit of a log-prob depends on the batch
        ]  # fmt: skip
        self.counts: Counter[str] = Counter()
        self.findings: list[str] = []
        self.damaged: set[str] = set()
        self.kept: set[str] = set()
        self.is_remote = "://" in out
        done = Command(*self.words).finish()
        assert done.returncode == 0, done.stderr
        self.reference = contents(self.folder)
        self.wipe()

    def wipe(self) -> None:
        for name in self.folder.sizes():
            self.folder.delete(name)
        self.damaged, self.kept = set(), set()
        self.counts["jobs"] += 1

    # -- one fault

    def fault(self) -> None:
        if self.folder.exists(MANIFEST):
            self.after_the_end()
            return
        faults: list[Callable[[], None]] = [
            self.kill, self.kill, self.stop, self.second_job, self.damage_unfinished, self.damage_unfinished,
            self.damage_stopped, self.remove_record, self.other_clock, self.lose_lock, self.change_data,
        ]  # fmt: skip
        act = self.draw.choice(faults)
        self.counts[act.__name__] += 1
        act()
        self.look(act.__name__)
        if self.draw.random() < 0.1:
            self.finish()

    def kill(self) -> None:
        process = Command(*self.words)
        if self.draw.random() < 0.3:
            time.sleep(self.draw.uniform(0, 2))
        else:
            self.wait_for_commits(process, self.draw.randrange(1, 4))
            time.sleep(self.draw.uniform(0, 0.1))
        process.kill()

    def stopped_job(self) -> Command:
        """A job that is stopped after up to two commits, unless it has ended before."""
        process = Command(*self.words)
        self.wait_for_lock(process)
        self.wait_for_commits(process, self.draw.randrange(0, 3))
        signal_to(process, signal.SIGSTOP)
        self.wait_until(lambda: process.poll() is not None or is_stopped(process.pid))
        return process

    def stop(self) -> None:
        process = self.stopped_job()
        before = self.folder.sizes("shards")
        if process.poll() is None:
            self.expect_refusal(Command(*self.words), "another dpkd job is writing", "a stopped job")
            if self.folder.sizes("shards") != before:
                self.findings.append("a second job wrote beside a stopped one")
        signal_to(process, signal.SIGCONT)
        self.wait_for_commits(process, 1)
        process.kill()

    def second_job(self) -> None:
        jobs = [Command(*self.words), Command(*self.words)]
        self.wait_until(lambda: any(job.poll() is not None for job in jobs))
        refused = [job for job in jobs if job.poll() is not None]
        for job in refused:
            if job.poll() != 0:  # 0: the other one had finished the cache
                self.expect_refusal(job, "another dpkd job is writing", "a second job")
        for job in jobs:
            if job not in refused:
                self.wait_for_commits(job, 1)
                job.kill()

    def damage_unfinished(self) -> None:
        if self.kept:
            self.damage(self.draw.choice(sorted(self.kept)))

    def damage_stopped(self) -> None:
        process = self.stopped_job()
        path, at_the_end = "", False
        if not self.folder.exists(MANIFEST):
            self.look("a stopped job")
            at_the_end = len(self.kept) == sum(name.startswith("shards/") for name in self.reference)
            if self.kept:
                path = self.draw.choice(sorted(self.kept))
                self.damage(path)
        signal_to(process, signal.SIGCONT)
        done = process.finish(TIMEOUT_S)
        if at_the_end and done.returncode == 0:
            # it was stopped between its last look and the manifest: a finished cache with a bad shard
            self.counts["damaged after the last look"] += 1
            self.after_the_end()
            return
        # it may have been stopped before it looked at the shards
        made_again = f"{path} has changed since it was committed" in done.stderr
        if done.returncode != 0 or (path and not made_again):
            self.expect_refusal(process, "a shard changed while the job ran", "a shard that changed during the job")

    def damage(self, path: str) -> None:
        data = self.folder.read(path)
        place = self.draw.randrange(len(data))
        flipped = data[:place] + bytes([data[place] ^ (1 << self.draw.randrange(8))]) + data[place + 1 :]
        how = self.draw.choice(["cut", "emptied", "flipped", "removed"])
        self.counts[f"shards {how}"] += 1
        if how == "removed":
            self.folder.delete(path)
        else:
            self.folder.write(path, {"cut": data[:place], "emptied": b"", "flipped": flipped}[how])
        self.kept.discard(path)
        self.damaged.add(path)

    def remove_record(self) -> None:
        if self.kept:
            path = self.draw.choice(sorted(self.kept))
            self.folder.delete(f"ledger/{path.replace('/', '--').removesuffix('.parquet')}.json")
            self.kept.discard(path)

    def other_clock(self) -> None:
        """Another machine holds the lock and renews it; its clock differs by up to three minutes."""
        ahead_s = self.draw.choice([-180.0, -30.0, 30.0, 180.0])
        with self.held_elsewhere(ahead_s):
            self.expect_refusal(Command(*self.words), "another dpkd job is writing", "a machine with another clock")
        self.folder.delete(LOCK)

    @contextlib.contextmanager
    def held_elsewhere(self, ahead_s: float) -> Iterator[None]:
        ended = threading.Event()

        def renew() -> None:
            while True:
                lock = {"host": "elsewhere", "pid": 7, "token": "t", "renewed": time.time() + ahead_s}
                self.folder.write(LOCK, json.dumps(lock).encode())
                if ended.wait(0.3):
                    return

        thread = threading.Thread(target=renew)
        thread.start()
        try:
            self.wait_until(lambda: self.folder.exists(LOCK))
            yield
        finally:
            ended.set()
            thread.join()

    def lose_lock(self) -> None:
        process = Command(*self.words)
        self.wait_for_lock(process)
        self.wait_for_commits(process, self.draw.randrange(0, 3))
        if process.poll() is None:
            if self.draw.random() < 0.5:
                self.folder.delete(LOCK)
            else:
                lock = {"host": "elsewhere", "pid": 7, "token": "t", "renewed": time.time()}
                self.folder.write(LOCK, json.dumps(lock).encode())
            if process.finish(TIMEOUT_S).returncode != 0:  # 0: it had just ended
                self.expect_refusal(process, "another dpkd job has taken over", "a lost lock")
        self.folder.delete(LOCK)

    def change_data(self) -> None:
        original = self.data.read_bytes()
        process = Command(*self.words)
        self.wait_for_commits(process, self.draw.randrange(1, 3))
        try:
            lines = original.splitlines(keepends=True)
            self.data.write_bytes(b"".join(lines[: len(lines) // 2]))
            if process.finish(TIMEOUT_S).returncode != 0:
                self.expect_refusal(process, "the data file changed", "changed data")
        finally:
            self.data.write_bytes(original)

    # -- the end

    def finish(self) -> None:
        """Let the job end, and compare the cache with the reference."""
        done = Command(*self.words).finish(TIMEOUT_S)
        if done.returncode != 0:
            self.findings.append(f"a resumed job ended with {done.returncode}: {done.stderr[-300:]}")
            self.wipe()
            return
        self.counts["finished"] += 1
        self.damaged.clear()  # they were made again
        self.compare("a finished cache")

    def after_the_end(self) -> None:
        self.counts["after_the_end"] += 1
        paths = sorted(path for path in self.reference if path.startswith("shards/"))
        for path in self.draw.sample(paths, self.draw.randrange(1, 4)):
            if path not in self.damaged:
                self.damage(path)
        self.compare("a damaged cache")
        repair = ["cache", "repair", self.out]
        if self.draw.random() < 0.5:
            self.counts["repairs killed"] += 1
            process = Command(*repair)
            time.sleep(self.draw.uniform(0, 2.5))
            process.kill()
            self.compare("a killed repair", may_be_whole=True)
        done = Command(*repair).finish(TIMEOUT_S)
        if done.returncode != 0:
            self.findings.append(f"a repair ended with {done.returncode}: {done.stderr[-300:]}")
        self.damaged.clear()
        self.counts["repaired"] += 1
        self.compare("a repaired cache")
        self.wipe()

    def compare(self, what: str, *, may_be_whole: bool = False) -> None:
        """Count a finding if readers accept something else than the reference, or refuse the reference."""
        found = contents(self.folder)
        files = {name: data for name, data in found.items() if name in self.reference}
        is_whole = files == self.reference
        try:
            verify_cache(self.out)
            accepted = True
        except UserError:
            accepted = False
        if accepted != is_whole:
            self.findings.append(f"{what}: {'accepted' if accepted else 'refused'}, equal to the reference: {is_whole}")
        if not may_be_whole and is_whole != (not self.damaged):
            self.findings.append(f"{what}: {len(self.damaged)} shards are damaged, equal to the reference: {is_whole}")
        if not self.damaged and not may_be_whole and set(found) != set(self.reference):
            self.findings.append(f"{what}: left over files {sorted(set(found) - set(self.reference))}")

    def look(self, what: str) -> None:
        """Compare the committed shards with the reference, and with those that were committed before the fault."""
        if self.folder.exists(MANIFEST):
            self.damaged.clear()
            # a kill may have left files of the job beside the manifest
            if Command(*self.words).finish(TIMEOUT_S).returncode != 0:
                self.findings.append(f"{what}: a finished job does not end well")
            self.compare(f"complete after {what}")
            return
        records = [json.loads(data) for data in self.folder.read_many(self.folder.sizes("ledger")).values()]
        shards = self.folder.read_many({record["path"] for record in records})
        sound = {
            record["path"]
            for record in records
            if hashlib.sha256(shards.get(record["path"], b"")).hexdigest() == record["sha256"]
        }
        if lost := self.kept - sound:
            self.findings.append(f"{what}: {len(lost)} committed shards are lost or changed")
        if wrong := [path for path in sound if shards[path] != self.reference[path]]:
            self.findings.append(f"{what}: {len(wrong)} committed shards differ from the reference")
        self.damaged -= sound
        self.kept = sound

    # -- processes

    def expect_refusal(self, process: Command, message: str, what: str) -> None:
        done = process.finish(TIMEOUT_S)
        if done.returncode != 2 or message not in done.stderr or "Traceback" in done.stderr:
            self.findings.append(f"{what}: exit code {done.returncode}: {done.stderr[-300:]}")

    def wait_for_commits(self, process: Command, number: int) -> None:
        before = len(self.folder.sizes("ledger"))
        self.wait_until(lambda: process.poll() is not None or len(self.folder.sizes("ledger")) >= before + number)

    def wait_for_lock(self, process: Command) -> None:
        def holds() -> bool:
            with contextlib.suppress(FileNotFoundError, ValueError):
                return bool(json.loads(self.folder.read(LOCK))["pid"] == process.pid)
            return False

        self.wait_until(lambda: process.poll() is not None or holds())

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + TIMEOUT_S
        while not condition():
            if time.monotonic() > deadline_s:
                self.findings.append(f"no progress in {TIMEOUT_S:.0f} s")
                return
            time.sleep(0.05 if self.is_remote else 0.01)  # an S3 server on this machine answers the job meanwhile


def signal_to(process: Command, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        process.send_signal(number)


def is_stopped(pid: int) -> bool:
    """Whether all threads of the process are stopped: one may still have been in a system call."""
    try:
        states = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:
        return False
    return set(states) <= {"T", "Z"}


def contents(folder: Folder) -> dict[str, bytes]:
    return folder.read_many(folder.sizes())


def torture(out: str, scratch: Path, faults: int, seed: int, rows: int = 120) -> dict[str, object]:
    """Run `faults` faults over the job that writes `out`, then let it end; the report should have no `findings`."""
    started_s = time.monotonic()
    job = Torture(out, scratch, seed, rows)
    for number in range(1, faults + 1):
        job.fault()
        if number % 20 == 0:
            say(f"{number} of {faults} faults, findings: {job.findings}")
    if not job.folder.exists(MANIFEST):
        job.finish()
    if job.damaged:
        job.after_the_end()
    return {
        "seed": seed,
        "faults": faults,
        "by_kind": dict(sorted(job.counts.items())),
        "findings": job.findings,
        "s": round(time.monotonic() - started_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="number of faults [200]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults [0]")
    parser.add_argument("--store", choices=["local", "s3"], default="local", help="where the cache is [local]")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        out = str(scratch / "cache")
        if given.store == "s3":
            from support.s3 import s3_server

            out = f"{stack.enter_context(s3_server())}/torture"
            PRELOAD.append("s3fs")
        report = torture(out, scratch, given.faults, given.seed)
    print(json.dumps(report, indent=2))
    raise SystemExit(1 if report["findings"] else 0)


if __name__ == "__main__":
    main()
