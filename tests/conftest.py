"""Fixtures for tests of several packages: toy models, data, a toy cache, the small real teacher."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.commands import start_forkserver
from support.hub import Hub
from support.toys import ROOT, VOCAB_SIZE, dolly_texts, make_toy, train_tokenizer, write_toy_data
from support.vllm_servers import VllmServer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# toy models are too small for several threads, and threads that wait for each other stall on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")
# the tests run in two processes: two engines must not wait for the same core while another is idle
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# vLLM compiles a count of its own in each process that generates: seconds, and no other result. As users run it, it is
# in the test of `dpkd serve-teacher`; the test of --compile asks for it too
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
# a shell that starts the tests in the background has them ignore Ctrl-C, and nohup a closed terminal: every process of
# a test would inherit that
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


def pytest_sessionstart() -> None:
    """One of several processes will need its forkserver, and the recipes of its tests use the same one."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        start_forkserver()


def pytest_collection_finish() -> None:
    """The tests have imported torch and transformers."""
    import support.frozen  # noqa: F401


_HAS_VLLM = pytest.StashKey[bool]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The first test with an engine in this process has imported vLLM."""
    if "vllm.v1.worker.cpu_worker" in sys.modules and _HAS_VLLM not in item.config.stash:
        from support.frozen import freeze_libraries

        freeze_libraries()
        item.config.stash[_HAS_VLLM] = True


#: files that take longest, longest first: a quarter of a minute and more alone on a core
LONGEST = (
    "test_ray_engine.py", "test_live.py", "test_outputs.py", "test_server_engine.py", "test_unkillable.py",
    "test_serve_teacher.py", "test_distributed.py", "test_learning.py", "test_optima.py", "test_openai.py",
    "test_importance.py", "test_pipeline.py", "test_options_change.py", "test_browser.py", "test_families.py",
    "test_live_training.py", "test_repair.py", "test_recipe.py", "test_kill.py", "test_reproduce.py",
    "test_following.py", "test_without_options.py", "test_torture.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, then those with engines: with short ones left at the end, both processes end together.

    `scripts/test.sh` hands out files in this order; pytest-xdist's own starts files of one long test last.
    """
    rank = {name: number for number, name in enumerate(LONGEST)}
    slow = {item.path for item in items if item.get_closest_marker("engine")}
    counts = Counter(item.path for item in items)

    def place(item: pytest.Item) -> tuple[object, ...]:
        return rank.get(item.path.name, len(rank)), item.path not in slow, -counts[item.path], item.path

    items.sort(key=place)


@pytest.fixture(scope="session")
def toy_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(directory, dolly_texts("train"), VOCAB_SIZE)
    return directory


@pytest.fixture(scope="session")
def toy_teacher(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Path) -> Path:
    return make_toy(tmp_path_factory.mktemp("models") / "toy-teacher", toy_tokenizer, layers=2, seed=1)


@pytest.fixture(scope="session")
def toy_student(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Path) -> Path:
    return make_toy(tmp_path_factory.mktemp("models") / "toy-student", toy_tokenizer, layers=1, seed=2)


@pytest.fixture(scope="session")
def other_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with another tokenizer of the same size."""
    tokenizer_dir = tmp_path_factory.mktemp("other-tokenizer")
    train_tokenizer(tokenizer_dir, dolly_texts("heldout"), VOCAB_SIZE)
    return make_toy(tmp_path_factory.mktemp("models") / "other-student", tokenizer_dir, layers=1, seed=3)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSONL and return the path."""

    def write(rows: list[object], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def teacher_dir() -> Path:
    """The small real teacher, which scripts/test.sh fetches."""
    directory = ROOT / "models" / "smollm2-135m-instruct"
    if not (directory / "config.json").is_file():
        pytest.fail(f"{directory} is not there: run the tests with `bash scripts/test.sh`")
    return directory


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub without models; a test commits to it."""
    return Hub(tmp_path / "hub", monkeypatch)


@pytest.fixture(scope="session")
def shared_server(toy_teacher: Path) -> Iterator[VllmServer]:
    server = VllmServer(toy_teacher)
    yield server
    server.close()


@pytest.fixture
def toy_server(shared_server: VllmServer) -> VllmServer:
    """A vLLM server with the toy teacher, one for all files; a test may kill it."""
    shared_server.start()
    shared_server.wait()
    return shared_server


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture(scope="session")
def repeat_rows(toy_data: Path) -> Callable[[Path, int], Path]:
    """Write the toy rows several times, under other ids: enough that a kill falls into the middle."""

    def write(path: Path, copies: int) -> Path:
        rows = [json.loads(line) for line in toy_data.read_text(encoding="utf-8").splitlines()]
        lines = [json.dumps(row | {"id": f"{copy}-{row['id']}"}) for copy in range(copies) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def toy_cache(tmp_path_factory: pytest.TempPathFactory, toy_teacher: Path, toy_student: Path, toy_data: Path) -> Path:
    """A finished cache of teacher and reference rows (6 rows a shard) with the round `r0`; never written to."""
    from dpkd.teacher_cache.build.cache import build_cache
    from dpkd.teacher_cache.options.cache import CacheConfig

    out = tmp_path_factory.mktemp("caches") / "toy"
    options = {
        "teacher": str(toy_teacher),
        "out": out,
        "engine": "transformers",
        "template": "chat",
        "max_new_tokens": 12,
        "top_k": 16,
        "rows_per_shard": 6,
    }
    build_cache(CacheConfig(**options, data=str(toy_data), responses="both"))
    build_cache(CacheConfig(**options, student=str(toy_student), round="r0"))
    return out


@pytest.fixture
def cache_copy(tmp_path: Path, toy_cache: Path) -> Path:
    """A copy of the toy cache that a test may damage."""
    import shutil

    return Path(shutil.copytree(toy_cache, tmp_path / "cache"))
