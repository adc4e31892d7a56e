"""A complete evaluation of real (toy) checkpoints: answers, resuming, and refused output directories."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpkd.core.errors import UserError
from dpkd.core.settings import read_toml
from dpkd.evaluate.evaluation import evaluate
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.evaluate.views.markdown import report_markdown

MakeConfig = Callable[..., EvalConfig]
WriteRows = Callable[[list[dict[str, Any]], str], Path]


def _answers(out: Path, model: str, data: str, seed: int) -> list[dict[str, Any]]:
    path = out / "generations" / model / data / f"seed-{seed}.parquet"
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def _mtimes(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


@pytest.fixture
def config(
    toy_teacher: Path,
    toy_student: Path,
    make_config: MakeConfig,
    write_rows: WriteRows,
    rows: list[dict[str, Any]],
) -> EvalConfig:
    return make_config(
        model=[f"teacher={toy_teacher}", f"student={toy_student}"],
        data=[f"first={write_rows(rows, 'first.jsonl')}", f"second={write_rows(rows[:3], 'second.jsonl')}"],
    )


def test_everything_is_written_and_agrees(config: EvalConfig, capsys: pytest.CaptureFixture[str]) -> None:
    path = evaluate(config)
    assert path == config.out / "report.json"
    report = json.loads(path.read_text())
    assert {name for name in _mtimes(config.out) if "/" not in name} == {
        "dpkd.toml",
        "per_example.parquet",
        "report.html",
        "report.json",
        "report.md",
        "rouge_by_length.svg",
        "exact_match_by_length.svg",
        "answer_lengths.svg",
    }
    assert (config.out / "report.md").read_text() == report_markdown(report)
    table = pq.read_table(config.out / "per_example.parquet").to_pandas()
    assert len(table) == 2 * 2 * (6 + 3)
    for model in ("teacher", "student"):
        for data, num_rows in (("first", 6), ("second", 3)):
            mine = table[(table.model == model) & (table.data == data)]
            summary = report["models"][model]["data"][data]
            assert summary["n"] == num_rows
            assert [bucket["n"] for bucket in summary["buckets"]] == [num_rows // 3] * 3
            assert summary["rouge_l"]["mean"] == pytest.approx(mine.rouge_l.mean())
            assert summary["mean_response_tokens"] == pytest.approx(mine.num_tokens.mean())
            for seed in (10, 20):
                answers = _answers(config.out, model, data, seed)
                assert [answer["response"] for answer in answers] == list(mine[mine.seed == seed].response)
    assert report["identities"]["models"]["teacher"] != report["identities"]["models"]["student"]
    assert capsys.readouterr().err.count("starting transformers for 18 responses") == 2


def test_greedy_answers_are_those_of_transformers_generate(
    toy_teacher: Path, make_config: MakeConfig, write_rows: WriteRows, rows: list[dict[str, Any]]
) -> None:
    config = make_config(model=f"m={toy_teacher}", data=f"d={write_rows(rows, 'd.jsonl')}", seeds="none", temperature=0)
    report = json.loads(evaluate(config).read_text())
    assert report["settings"]["seeds"] == [10]
    # seeds that are left off and the same seeds given are one evaluation
    assert read_toml(config.out / "dpkd.toml")["seeds"] == [10]
    assert json.loads(evaluate(config.model_copy(update={"seeds": (10,)})).read_text()) == report
    tokenizer = AutoTokenizer.from_pretrained(toy_teacher)
    model = AutoModelForCausalLM.from_pretrained(toy_teacher, dtype=torch.float32)
    for row, answer in zip(rows, _answers(config.out, "m", "d", 10), strict=True):
        prompt = torch.tensor([tokenizer.encode(row["instruction"])])
        expected = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=6, pad_token_id=0
        )[0, prompt.shape[1] :].tolist()
        assert answer["response_ids"] == expected
        assert answer["response"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert answer["example_id"] == row["id"]
        assert answer["num_tokens"] == len(expected)
        assert answer["finish_reason"] == ("stop" if expected[-1] == tokenizer.eos_token_id else "length")


def test_a_model_that_gives_the_references_scores_full_marks(
    toy_teacher: Path, make_config: MakeConfig, write_rows: WriteRows, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    # the same seeds and ids give the same answers, so a model's own answers are references that it hits
    first = make_config(
        model=f"m={toy_teacher}", data=f"d={write_rows(rows, 'd.jsonl')}", out=tmp_path / "first", seeds=10
    )
    evaluate(first)
    responses = [answer["response"] for answer in _answers(first.out, "m", "d", 10)]
    assert len(set(responses)) == len(rows)
    assert all(response.strip() for response in responses)
    hit = [{**row, "output": ["miss", response]} for row, response in zip(rows, responses, strict=True)]
    miss = [{**row, "output": response} for row, response in zip(rows, responses[1:] + responses[:1], strict=True)]
    second = make_config(
        model=f"m={toy_teacher}",
        data=[f"hit={write_rows(hit, 'hit.jsonl')}", f"miss={write_rows(miss, 'miss.jsonl')}"],
        out=tmp_path / "second",
        seeds=10,
    )
    data = json.loads(evaluate(second).read_text())["models"]["m"]["data"]
    # six hits of six: Wilson's lower end is 100 * 6 / (6 + 3.8415)
    assert data["hit"]["exact_match"] == {"mean": 100.0, "low": pytest.approx(60.97, abs=0.01), "high": 100.0}
    # a response without a single a-z or 0-9 has no Rouge tokens and scores 0 even against itself
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    own = [100 * scorer.score(response, response)["rougeL"].fmeasure for response in responses]
    assert max(own) == 100.0
    assert data["hit"]["rouge_l"]["mean"] == pytest.approx(np.mean(own))
    assert data["miss"]["exact_match"]["mean"] < 100.0
    assert data["miss"]["rouge_l"]["mean"] < data["hit"]["rouge_l"]["mean"]


def test_a_finished_evaluation_is_left_as_it_is(config: EvalConfig, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(config)
    before = _mtimes(config.out)
    capsys.readouterr()
    # neither memory nor the spelling of the directory is part of what was asked
    again = config.model_copy(update={"max_num_seqs": 3, "out": config.out / ".." / config.out.name})
    assert evaluate(again).resolve() == (config.out / "report.json").resolve()
    assert "is complete already" in capsys.readouterr().err
    assert _mtimes(config.out) == before


@pytest.fixture
def greedy(config: EvalConfig) -> EvalConfig:
    """Greedy decoding: its answers do not hang on rounding, so those of another batch can be held equal."""
    return config.model_copy(update={"temperature": 0.0, "seeds": (10,)})


def test_only_what_is_missing_or_broken_is_generated_again(
    greedy: EvalConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(greedy)
    report = (greedy.out / "report.json").read_bytes()
    generations = greedy.out / "generations"
    missing = generations / "teacher/first/seed-10.parquet"
    broken = generations / "student/second/seed-10.parquet"
    contents = [missing.read_bytes(), broken.read_bytes()]
    missing.unlink()
    broken.write_bytes(contents[1][:-20])
    (greedy.out / "report.json").unlink()
    before = _mtimes(generations)
    capsys.readouterr()
    evaluate(greedy)
    said = capsys.readouterr().err
    assert f"{broken} cannot be read" in said
    assert "model teacher: starting transformers for 6 responses" in said
    assert "model student: starting transformers for 3 responses" in said
    after = _mtimes(generations)
    assert {name for name in after if after[name] != before.get(name)} == {
        "teacher/first/seed-10.parquet",
        "student/second/seed-10.parquet",
    }
    assert [missing.read_bytes(), broken.read_bytes()] == contents
    assert (greedy.out / "report.json").read_bytes() == report


def test_a_lost_report_is_written_again_without_an_engine(
    config: EvalConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluate(config).read_bytes()
    (config.out / "report.json").unlink()
    before = _mtimes(config.out / "generations")
    capsys.readouterr()
    assert evaluate(config).read_bytes() == report
    said = capsys.readouterr().err
    assert "model teacher: all 18 responses exist already" in said
    assert "model student: all 18 responses exist already" in said
    assert "starting" not in said
    assert _mtimes(config.out / "generations") == before


def test_answers_of_other_weights_are_generated_again(
    toy_teacher: Path,
    toy_student: Path,
    make_config: MakeConfig,
    write_rows: WriteRows,
    rows: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = Path(shutil.copytree(toy_teacher, tmp_path / "model"))
    config = make_config(model=f"m={model}", data=f"d={write_rows(rows, 'd.jsonl')}", seeds=10)
    evaluate(config)
    before = _answers(config.out, "m", "d", 10)
    shutil.copytree(toy_student, model, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"holds another report; differing: .*models\.m\.model\.weights_sha256: "):
        evaluate(config)
    (config.out / "report.json").unlink()
    capsys.readouterr()
    evaluate(config)
    assert "was made by another model, data or settings" in capsys.readouterr().err
    assert _answers(config.out, "m", "d", 10) != before


def test_other_options_are_refused_and_nothing_is_overwritten(config: EvalConfig) -> None:
    evaluate(config)
    before = _mtimes(config.out)
    other = config.model_copy(update={"temperature": 0.5, "seeds": (10,)})
    with pytest.raises(
        UserError,
        match=r"holds another report; differing: seeds: \[10, 20\] -> \[10\]; temperature: 1\.0 -> 0\.5 "
        r"\(in .*out\)\. Choose another --out",
    ):
        evaluate(other)
    assert _mtimes(config.out) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dpkd.toml", "= no TOML", r"record of the output cannot be read.*dpkd\.toml"),
        ("report.json", "{}", r"not empty and holds no report of dpkd: expected a file dpkd\.toml"),
    ],
)
def test_a_directory_of_something_else_is_refused(config: EvalConfig, name: str, content: str, message: str) -> None:
    config.out.mkdir()
    (config.out / name).write_text(content)
    with pytest.raises(UserError, match=message):
        evaluate(config)
    assert [path.name for path in config.out.iterdir()] == [name]


def test_a_broken_report_and_an_out_that_is_a_file_are_refused(config: EvalConfig) -> None:
    config.out.mkdir()
    (config.out / "dpkd.toml").write_text(config.to_toml())
    (config.out / "report.json").write_text('{"format_version": 1')
    with pytest.raises(UserError, match=r"the report cannot be read.*Delete it and run the same command again"):
        evaluate(config)
    file = config.out / "dpkd.toml"
    with pytest.raises(UserError, match=r"the output is a file"):
        evaluate(config.model_copy(update={"out": file}))
    with pytest.raises(UserError, match=r"the output directory cannot be written"):
        evaluate(config.model_copy(update={"out": file / "below"}))


def test_another_metric_generates_nothing(
    config: EvalConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = json.loads(evaluate(config).read_text())
    before = _mtimes(config.out)
    capsys.readouterr()
    changes = {
        "out": tmp_path / "second",
        "generations": config.out / "generations",
        "rouge_tokenizer": "character",
        "buckets": ("median",),
        "bucket_by": "tokens",
        "bucket_of": "prediction",
        "num_sign_flips": 200,
    }
    second = config.model_copy(update=changes)
    report = json.loads(evaluate(second).read_text())
    assert capsys.readouterr().err.count("all 18 responses exist already") == 2
    assert _mtimes(config.out) == before
    assert not (second.out / "generations").exists()
    ours, theirs = (found["models"]["teacher"]["data"]["first"] for found in (report, first))
    assert ours["mean_response_tokens"] == theirs["mean_response_tokens"]
    assert ours["rouge_l"] != theirs["rouge_l"]
    assert sum(bucket["num_answers"] for bucket in ours["buckets"]) == 12  # six rows, two seeds
    assert report["data"]["first"]["edges"] != [30, 70]
    assert "buckets" not in report["comparisons"]["first"][0]


def test_shared_answers_of_other_inputs_are_not_overwritten(config: EvalConfig, tmp_path: Path) -> None:
    evaluate(config)
    before = _mtimes(config.out)
    changes = {"out": tmp_path / "second", "generations": config.out / "generations", "temperature": 0.5}
    with pytest.raises(UserError, match=r"has a file that was made from other inputs.*another --generations"):
        evaluate(config.model_copy(update=changes))
    assert _mtimes(config.out) == before


_RUN = """
import sys
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.evaluate.evaluation import evaluate
from dpkd.core.settings import read_toml
from pathlib import Path

if __name__ == "__main__":
    evaluate(EvalConfig.parse(read_toml(Path(sys.argv[1])), where=sys.argv[1]))
"""


@pytest.mark.engine
def test_a_killed_evaluation_resumes_and_ends_as_if_never_killed(
    toy_teacher: Path,
    make_config: MakeConfig,
    write_rows: WriteRows,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # 17 rows a set: the first set is complete with the engine's second batch of 16, the second is then half done
    rows = [{"id": f"row-{i}", "instruction": f"Say {i}", "output": f"{i} " * 40} for i in range(17)]
    config = make_config(
        model=f"m={toy_teacher}",
        data=[f"first={write_rows(rows, 'first.jsonl')}", f"second={write_rows(rows, 'second.jsonl')}"],
        temperature=0,
        seeds=10,
        max_new_tokens=64,
    )
    whole = config.model_copy(update={"out": tmp_path / "whole"})
    evaluate(whole)
    options, script = tmp_path / "options.toml", tmp_path / "run.py"
    options.write_text(config.to_toml())
    script.write_text(_RUN)
    first, second = (config.out / "generations" / "m" / data / "seed-10.parquet" for data in ("first", "second"))
    partial = second.with_suffix(".partial.jsonl")
    process = subprocess.Popen([sys.executable, str(script), str(options)], stderr=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + 120
        while not partial.exists() and process.poll() is None and time.monotonic() < deadline_s:
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()
    assert first.exists()
    assert not second.exists(), "the kill came too late to test anything"
    written_ns = first.stat().st_mtime_ns
    capsys.readouterr()
    evaluate(config)
    said = capsys.readouterr().err
    asked = int(said.split("starting transformers for ")[1].split()[0])
    assert 0 < asked < 17  # the answers that were in when the kill came are not asked for again
    assert first.stat().st_mtime_ns == written_ns
    assert not partial.exists()
    assert (config.out / "per_example.parquet").read_bytes() == (whole.out / "per_example.parquet").read_bytes()
    for name in ("report.json", "report.md"):
        # the command names the directory
        assert (config.out / name).read_text().replace(str(config.out), "OUT") == (
            whole.out / name
        ).read_text().replace(str(whole.out), "OUT")
