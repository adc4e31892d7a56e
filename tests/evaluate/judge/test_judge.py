"""The judge with a real vLLM server: a toy model with constrained or free replies, and kills."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.commands import Command, dpkd
from support.judge_endpoints import Endpoint, counting
from support.toys import ROOT
from support.vllm_servers import VllmServer

from dpkd.evaluate.judge.judge import judge
from dpkd.evaluate.judge.report import FORMAT_VERSION
from dpkd.evaluate.options.judge import JudgeConfig

pytestmark = pytest.mark.engine

DOCS = (ROOT / "docs" / "judge.md").read_text(encoding="utf-8")
NUM_ROWS = 24  # enough that a kill falls in the middle, also on a busy machine
FORMS = {"score": "Score: (10|[1-9])", "scores": "Scores: [1-9] [1-9]", "verdict": "Verdict: (A|B|tie)"}


@pytest.fixture(scope="module")
def endpoint(toy_teacher: Path) -> Iterator[Endpoint]:
    """A vLLM server with the toy teacher, which knows itself as `toy`, behind an endpoint that counts."""
    overrides = ["--hf-overrides", '{"max_position_embeddings": 1024}', "--max-model-len", "1024"]
    server = VllmServer(toy_teacher, arguments=[*overrides, "--served-model-name", "toy"])
    with contextlib.ExitStack() as stack:
        stack.callback(server.close)
        server.start()
        server.wait()
        yield stack.enter_context(counting(server.url + "/v1"))


@pytest.fixture
def options(endpoint: Endpoint, tmp_path: Path) -> dict[str, Any]:
    """Options for judging the predictions `a` and `b` to short rows."""
    rows = [{"id": f"r{n}", "instruction": f"Name {n} rivers", "output": f"River {n}"} for n in range(NUM_ROWS)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in "ab":
        lines = [{"prediction": f"{name} answers {n * 7}"} for n in range(NUM_ROWS)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "predictions": [f"{name}={tmp_path / name}.jsonl" for name in "ab"], "data": f"d={tmp_path / 'd.jsonl'}",
        "out": tmp_path / "out", "judge_url": endpoint.url, "judge_model": "toy", "max_tokens": 16,
        "num_sign_flips": 100, "tries": 2,
    }  # fmt: skip


def held_to(form: str) -> str:
    """The field of a request with which vLLM lets the model say nothing but the form."""
    return f"structured_outputs={json.dumps({'regex': FORMS[form]})}"


def run(options: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report of a judging and its rows, one a question."""
    path = judge(JudgeConfig.parse(options, where="a test"))
    rows: list[dict[str, Any]] = pq.read_table(path.parent / "per_verdict.parquet").to_pylist()
    return json.loads(path.read_text()), rows


def test_grades_are_read_and_counted(endpoint: Endpoint, options: dict[str, Any]) -> None:
    before = len(endpoint.bodies)
    report, rows = run(options | {"extra_body": held_to("score")})
    assert len(endpoint.bodies) - before == len(rows) == 2 * NUM_ROWS
    assert all(row["reply"] == f"Score: {row['read']}" for row in rows)
    assert len({row["read"] for row in rows}) > 1
    for name in "ab":
        grades = [int(row["read"]) for row in rows if row["model"] == name]
        summary = report["models"][name]["data"]["d"]
        assert summary["grade"]["mean"] == pytest.approx(sum(grades) / NUM_ROWS)
        assert report["unparsable"][name]["share"] == 0.0
    assert report["judge"]["models_said"] == {"toy": 2 * NUM_ROWS}
    assert report["tokens"]["num_without_usage"] == 0
    assert report["tokens"]["prompt"] > report["tokens"]["completion"] > 5 * 2 * NUM_ROWS
    named_in_docs(report)


def test_a_reference_is_graded_in_the_same_reply(options: dict[str, Any]) -> None:
    report, rows = run(options | {"extra_body": held_to("scores"), "grade_reference": True, "limit": 4})
    for name in "ab":
        grades = [[int(grade) for grade in row["read"].split()] for row in rows if row["model"] == name]
        places = [row["swapped"] for row in rows if row["model"] == name]
        ours = sum(pair[swapped] for pair, swapped in zip(grades, places, strict=True))
        summary = report["models"][name]["data"]["d"]
        assert summary["grade"]["mean"] == pytest.approx(ours / 4)
        assert summary["ratio"]["mean"] == pytest.approx(100 * ours / (sum(map(sum, grades)) - ours))
    named_in_docs(report)


def test_pairs_are_asked_about_in_both_orders(options: dict[str, Any]) -> None:
    report, rows = run(options | {"extra_body": held_to("verdict"), "mode": "pairwise", "sample": 6})
    assert len(rows) == 12
    (pair,) = report["pairs"]["d"]
    said = {(row["example_id"], row["swapped"]): row["read"] for row in rows}
    both = [(said[name, False], said[name, True]) for name in {row["example_id"] for row in rows}]
    assert (pair["model"], pair["baseline"]) == ("b", "a")
    assert pair["num_wins"] == both.count(("A", "B"))
    assert pair["num_losses"] == both.count(("B", "A"))
    assert pair["num_undecided"] == 0
    assert pair["position"]["num_first_twice"] == both.count(("A", "A"))
    assert pair["position"]["num_second_twice"] == both.count(("B", "B"))
    named_in_docs(report)


def test_nonsense_is_unparsable_and_counted(endpoint: Endpoint, options: dict[str, Any], tmp_path: Path) -> None:
    before = len(endpoint.bodies)
    command = ["judge", *flags(options | {"limit": 2, "reask": True})]
    done = dpkd(*command)
    assert done.returncode == 0, done.stderr
    assert len(endpoint.bodies) - before == 8  # each question twice
    assert "| `a` | 2 | 2 | 100.0 | " in done.stdout
    assert "unparsable_or_refused 100.0%" in done.stderr
    report = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert report["models"]["a"]["data"]["d"]["grade"] == {"mean": None, "low": None, "high": None}
    assert report["unparsable"]["a"]["num_asked_again"] == 2
    again = dpkd(*command, "--estimate")
    assert again.returncode == 0, again.stderr
    assert "questions: 4, 0 of them still to ask" in again.stdout


def test_a_prompt_over_the_servers_length_fails(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"prediction": "word " * (2000 if n == 1 else 1)}) + "\n" for n in range(NUM_ROWS))
    )
    given = options | {"limit": 3, "extra_body": held_to("score")}
    done = dpkd("judge", *flags(given))
    assert done.returncode == 3, done.stderr
    report = json.loads((tmp_path / "out" / "judge.json").read_text())
    (refused,) = report["refused"]
    assert (refused["model"], refused["example_id"]) == ("a", "r1")
    assert "maximum context length" in refused["reason"]
    assert report["models"]["a"]["data"]["d"]["num_grades"] == 2


def test_a_model_that_the_server_does_not_have(options: dict[str, Any]) -> None:
    done = dpkd("judge", *flags(options | {"judge_model": "gpt-9"}))
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: there is no judge at this address: found HTTP 404: The model `gpt-9` does not exist")


def test_a_killed_judging_asks_only_for_what_is_missing(
    endpoint: Endpoint, options: dict[str, Any], tmp_path: Path
) -> None:
    given = options | {"extra_body": held_to("score"), "concurrency": 2}
    before = len(endpoint.bodies)
    command = ["judge", *flags(given)]
    verdicts = tmp_path / "out" / "verdicts.jsonl"
    kept: list[bytes] = []
    for how, more in ((signal.SIGKILL, 3), (signal.SIGTERM, 3), (signal.SIGINT, 2)):
        process = Command(*command)
        deadline_s = time.monotonic() + 60
        while not verdicts.exists() or verdicts.read_bytes().count(b"\n") < len(kept) + 1 + more:
            assert process.poll() is None, process.stderr
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        process.send_signal(how)
        returncode, _, errors = process.finish(60)
        assert returncode == (-how if how == signal.SIGKILL else 130), errors
        assert "Traceback" not in errors
        assert not (tmp_path / "out" / "judge.json").exists()
        lines = verdicts.read_bytes().splitlines()[1:]
        assert lines[: len(kept)] == kept
        kept = lines
    assert "run the same command again to resume" in errors
    assert len(kept) < 2 * NUM_ROWS
    num_before_last = len(endpoint.bodies)
    done = dpkd(*command)
    assert done.returncode == 0, done.stderr
    assert f"{2 * NUM_ROWS - len(kept)} of {2 * NUM_ROWS} questions" in done.stderr
    assert len(endpoint.bodies) - num_before_last == 2 * NUM_ROWS - len(kept)
    # only the two under way at each kill are asked again, if at all
    asked = endpoint.questions[before:]
    assert len(set(asked)) == 2 * NUM_ROWS
    assert len(asked) <= 2 * NUM_ROWS + 3 * 2

    whole, whole_rows = run(given | {"out": tmp_path / "whole"})
    mended = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert pq.read_table(tmp_path / "out" / "per_verdict.parquet").to_pylist() == whole_rows
    for report in (whole, mended):
        del report["command"]
    assert mended == whole


def named_in_docs(report: dict[str, Any]) -> None:
    """docs/judge.md names every key of the report."""

    def keys(value: Any) -> Iterator[str]:
        for key, inner in value.items() if isinstance(value, dict) else ():
            yield key
            yield from keys(inner)
        for inner in value if isinstance(value, list) else ():
            yield from keys(inner)

    assert f"judge.json, format {FORMAT_VERSION}" in DOCS
    free = ("settings", "identities", "software", "body", "models_said", "judged")  # with keys of others
    found = set(report)
    for part, value in report.items():
        if part not in free:
            found.update(
                keys({key: inner for key, inner in value.items() if key not in free} if part == "judge" else value)
            )
    assert not [key for key in sorted(found - {"a", "b", "d"}) if f"`{key}`" not in DOCS]


def flags(options: dict[str, Any]) -> list[str]:
    """The options as a command line."""
    words = []
    for key, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{key.replace('_', '-')}"] + ([] if one is True else [str(one)])
    return words
