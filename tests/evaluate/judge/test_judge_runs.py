"""Complete runs with endpoints that fail: what is kept, asked again and refused, and what is never written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.judge_endpoints import Answer, Endpoint, completion, failure, serving

from dpkd.core.errors import UserError
from dpkd.core.outputs import lock_directory
from dpkd.evaluate.judge.judge import estimate, judge
from dpkd.evaluate.judge.tokens import estimate_text
from dpkd.evaluate.options.judge import KEY_VARIABLE, JudgeConfig

WriteRows = Callable[..., Path]
Make = Callable[..., JudgeConfig]


@pytest.fixture
def make(write_rows: WriteRows, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Options for judging the predictions `a` and `b` to six rows: twelve questions."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    data = write_rows(rows, "d.jsonl")
    given = [
        f"{name}={write_rows([{'prediction': f'{name} {n}'} for n in range(6)], f'{name}.jsonl')}" for name in "ab"
    ]

    def config(endpoint: Endpoint, **options: Any) -> JudgeConfig:
        plain = {
            "predictions": given, "data": f"d={data}", "out": tmp_path / "out", "judge_url": endpoint.url,
            "judge_model": "judge", "concurrency": 1, "tries": 2, "retry_delay_s": 0.01, "num_sign_flips": 100,
        }  # fmt: skip
        return JudgeConfig.parse(plain | options, where="a test")

    return config


def num_kept(config: JudgeConfig) -> int:
    path = config.verdicts_path()
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


def test_verdicts_survive_a_judge_that_goes_away(make: Make) -> None:
    num_good = 4

    def answer(body: dict[str, Any]) -> Answer:
        return completion("Score: 8") if len(endpoint.bodies) <= num_good else failure(500)

    with serving(answer) as endpoint:
        config = make(endpoint)
        with pytest.raises(UserError, match=r"the judge does not answer: found HTTP 500"):
            judge(config)
        assert num_kept(config) == 4
        assert not (config.out / "judge.json").exists()
        num_good, before = 99, len(endpoint.bodies)
        report = json.loads(judge(config).read_text())
        assert not set(endpoint.questions[:4]) & set(endpoint.questions[before:])
        assert len(endpoint.bodies) == before + 8
        assert report["models"]["a"]["data"]["d"]["num_grades"] == 6
        # the failed tries cost no tokens that anybody counted
        assert report["tokens"]["num_requests"] == 12


def test_a_finished_judging_asks_nothing(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda body: completion("Score: 8")) as endpoint:
        config = make(endpoint)
        path = judge(config)
        before = {file: file.read_bytes() for file in config.out.iterdir()}
        assert {file.name for file in before} == {
            "dpkd.toml", "judge.json", "judge.md", "judge.png", "judge.svg", "per_verdict.parquet", "verdicts.jsonl",
        }  # fmt: skip
        capsys.readouterr()
        assert judge(config.model_copy(update={"concurrency": 3})) == path
        assert "is complete already" in capsys.readouterr().err
        assert {file: file.read_bytes() for file in config.out.iterdir()} == before
        path.unlink()
        judge(config)  # a lost report is written again from the verdicts
        assert "all 12 verdicts exist already" in capsys.readouterr().err
        assert {file: file.read_bytes() for file in config.out.iterdir()} == before
        assert len(endpoint.bodies) == 12


def test_an_output_directory_of_something_else_is_left_alone(make: Make, tmp_path: Path) -> None:
    with serving(lambda body: completion("Score: 8")) as endpoint:
        config = make(endpoint)
        judge(config)
        for other in ({"limit": 2}, {"mode": "pairwise"}, {"reask": False}):
            with pytest.raises(UserError, match=r"holds another report; differing: .*--verdicts reuses"):
                judge(make(endpoint, **other))
        prompt = tmp_path / "p.txt"
        prompt.write_text("{answer} Score: N")
        with pytest.raises(UserError, match=r"holds another report; differing: prompt\.sha256"):
            judge(make(endpoint, prompt=prompt))
        (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text().replace("a 1", "a one"))
        with pytest.raises(UserError, match=r"holds another report; differing: answers\.predictions\.a\.d"):
            judge(config)
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"the output is a file"):
            judge(make(endpoint, out=tmp_path / "file"))
        busy = tmp_path / "busy" / "verdicts.jsonl"
        with (
            lock_directory(busy.parent, "job.lock"),
            pytest.raises(UserError, match=r"another dpkd job is writing to this directory"),
        ):
            judge(make(endpoint, out=busy.parent))
        assert list(busy.parent.iterdir()) == []


def test_verdicts_are_shared_by_runs_over_other_rows(make: Make, tmp_path: Path) -> None:
    with serving(lambda body: completion("Score: 8")) as endpoint:
        first = make(endpoint, limit=2)
        judge(first)
        assert len(endpoint.bodies) == 4
        whole = make(endpoint, out=tmp_path / "whole", verdicts=first.verdicts_path())
        assert estimate(whole)["num_missing"] == 8
        report = json.loads(judge(whole).read_text())
        assert len(endpoint.bodies) == 12
        assert report["tokens"]["num_requests"] == 12
        assert not (whole.out / "verdicts.jsonl").exists()


def test_equal_questions_are_asked_once(make: Make, write_rows: WriteRows) -> None:
    same = write_rows([{"prediction": "the same"}] * 6, "same.jsonl")
    with serving(lambda body: completion("Score: 8")) as endpoint:
        report = json.loads(judge(make(endpoint, predictions=[f"a={same}", f"b={same}"])).read_text())
        assert len(endpoint.bodies) == 6
        assert [report["models"][name]["data"]["d"]["num_grades"] for name in "ab"] == [6, 6]
        assert report["unparsable"]["a"]["num_questions"] == 6


def test_an_estimate_asks_and_writes_nothing(make: Make) -> None:
    with serving(lambda body: completion("Score: 8")) as endpoint:
        config = make(endpoint, price_in=2, price_out=10, max_tokens=100)
        found = estimate(config)
        assert endpoint.bodies == []
        assert not config.out.exists()
        assert (found["num_questions"], found["num_missing"], found["completion"]) == (12, 12, 1200)
        assert found["cost"] == pytest.approx((found["prompt"] * 2 + 1200 * 10) / 1e6)
        assert "questions: 12, 12 of them still to ask" in estimate_text(found)
        judge(config)
        assert sum(len(text) for text in endpoint.questions) / 4 == pytest.approx(found["prompt"], abs=1)


def test_one_refused_question_is_recorded_as_failed(make: Make) -> None:
    def answer(body: dict[str, Any]) -> Answer:
        return failure(400, "too long") if "a 0" in body["messages"][0]["content"] else completion("Score: 8")

    with serving(answer) as endpoint:
        config = make(endpoint)  # the refused question is the first one: it waits for a reply to another
        report = json.loads(judge(config).read_text())
        assert [(row["model"], row["reason"]) for row in report["refused"]] == [("a", "HTTP 400: too long")]
        assert report["unparsable"]["a"]["num_refused"] == 1
        assert num_kept(config) == 12
        assert report["models"]["a"]["data"]["d"]["num_grades"] == 5


@pytest.mark.parametrize("limit", [1, 6])
def test_a_judge_that_refuses_everything_ends_the_run(make: Make, limit: int) -> None:
    with serving(lambda body: failure(400, "no `seed` here")) as endpoint:
        config = make(endpoint, limit=limit, concurrency=2)
        with pytest.raises(UserError, match=r"refused all of the first [25] questions: found HTTP 400: no `seed` here"):
            judge(config)
        assert len(endpoint.bodies) <= 6
        assert num_kept(config) == 0  # so that they are asked again


def test_a_second_request_continues_from_the_first_reply(make: Make, tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> Answer:
        if "a 0" in body["messages"][0]["content"] and len(body["messages"]) > 1:
            return failure(400, "too long by now")
        return completion("Score: 8" if len(body["messages"]) > 1 else "Eight!")

    with serving(answer) as endpoint:
        report = json.loads(judge(make(endpoint, limit=2)).read_text())
        second = next(body for body in endpoint.bodies if len(body["messages"]) > 1 and "b 0" in str(body["messages"]))
        assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
        assert second["messages"][1]["content"] == "Eight!"
        assert second["messages"][2]["content"].endswith("\nScore: N")
        assert report["unparsable"]["b"]["num_asked_again"] == 2
        assert report["models"]["b"]["data"]["d"]["grade"]["mean"] == 8.0
        assert report["unparsable"]["a"]["num_unparsable"] == 1
        assert report["refused"] == []
        assert len(endpoint.bodies) == 8
    with serving(answer) as endpoint:
        report = json.loads(judge(make(endpoint, limit=2, reask=False, out=tmp_path / "plain")).read_text())
        assert len(endpoint.bodies) == 4
        assert report["unparsable"]["b"]["share"] == 1.0


def test_as_many_at_once_as_allowed(make: Make) -> None:
    def answer(body: dict[str, Any]) -> Answer:
        time.sleep(0.1)
        return completion("Score: 8")

    with serving(answer) as endpoint:
        judge(make(endpoint, concurrency=3))
        assert endpoint.most_open == 3


def test_the_key_is_sent_and_written_nowhere(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "sk-test-0123456789"
    monkeypatch.setenv(KEY_VARIABLE, key)

    def answer(body: dict[str, Any]) -> Answer:
        if len(endpoint.bodies) == 1:
            return failure(500, f"your key is {key}")
        if len(endpoint.bodies) == 2:
            return failure(400, f"your key is {key}")
        return completion(f"Your key is {key}\nScore: 8", model=f"judge of {key}")

    with serving(answer) as endpoint:
        config = make(endpoint)
        judge(config)
        assert all(headers["authorization"] == f"Bearer {key}" for headers in endpoint.headers)
        said = capsys.readouterr()
        assert "your key is ***" in said.err
        assert key not in said.err + said.out
        for file in config.out.iterdir():
            assert key.encode() not in file.read_bytes(), file
