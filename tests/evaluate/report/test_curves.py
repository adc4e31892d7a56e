"""Training curves: the logs of a real run, thinned by value, in the report, its page and its plots."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpkd.core.errors import UserError
from dpkd.evaluate.evaluation import evaluate
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.evaluate.report.curves import LOGS, METRICS, read_run, thinned, thinning_text

MakeConfig = Callable[..., EvalConfig]
WriteRows = Callable[[list[Any], str], Path]


def _write_run(directory: Path, lines: str, validations: str = "") -> str:
    directory.mkdir()
    (directory / "metrics.jsonl").write_text(lines)
    if validations:
        (directory / "validation.jsonl").write_text(validations)
    return str(directory)


def test_short_curves_keep_their_points() -> None:
    assert thinned([(1, 2.0), (2, 4.0)], most=2) == {"steps": [1.0, 2.0], "values": [2.0, 4.0], "lines_a_point": 1}


def test_points_of_long_curves_are_means_of_neighbours() -> None:
    found = thinned([(step, float(step**2)) for step in range(1, 6)], most=2)
    assert found == {"steps": [2.0, 4.5], "values": [14 / 3, 20.5], "lines_a_point": 3}
    assert len(thinned([(step, 1.0) for step in range(100_001)])["steps"]) <= 200


def test_a_run_is_read_as_it_stands(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 3.0, "kld": None, "reward_margin": 0.5, "epoch": 0},
        {"step": 2, "loss": float("nan"), "kld": None, "reward_margin": -0.5, "epoch": 0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo'  # the run is still writing
    run = read_run("r", _write_run(tmp_path / "run", text, '{"step": 2, "loss": 2.5, "rouge_l": 11.0}\n'))
    assert run["num_steps"] == 2
    assert {metric: curve["values"] for metric, curve in run["training"].items()} == {
        "loss": [3.0],
        "reward_margin": [0.5, -0.5],
    }
    assert {metric: curve["steps"] for metric, curve in run["validation"].items()} == {"loss": [2.0], "rouge_l": [2.0]}
    assert thinning_text({"r": run}) == ""
    run["training"]["loss"]["lines_a_point"] = 7
    assert thinning_text({"r": run}) == "Points are means of up to 7 steps."


@pytest.mark.parametrize("line", ["oops", "[1]", '{"loss": 1}', '{"step": "x"}'])
def test_a_broken_log_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    directory = _write_run(tmp_path / "run", f'{{"step": 1, "loss": 1}}\n{line}\n')
    with pytest.raises(UserError, match=r"line 2 is not a training log's: .*metrics\.jsonl"):
        read_run("r", directory)


def test_a_directory_that_is_no_run_is_refused(make_config: MakeConfig, write_rows: WriteRows, tmp_path: Path) -> None:
    given = write_rows([{"prediction": "x"}], "p.jsonl")
    data = write_rows([{"instruction": "a", "output": "b"}], "d.jsonl")
    with pytest.raises(UserError, match=r"directory of the run 'r' has no metrics\.jsonl .*--out directory of a"):
        evaluate(make_config(predictions=f"p={given}", data=f"d={data}", run=f"r={tmp_path}"))
    with pytest.raises(UserError, match="the name 'a b' must start"):
        make_config(predictions=f"p={given}", data=f"d={data}", run=f"a b={tmp_path}")


def test_the_logs_are_those_that_a_run_writes() -> None:
    from dpkd.distill.objectives.objective import METRICS as WRITTEN
    from dpkd.distill.run.logs import METRICS_LOG, VALIDATION_LOG

    assert LOGS == {"training": METRICS_LOG, "validation": VALIDATION_LOG}
    assert set(METRICS) <= {*WRITTEN, "loss", "rouge_l"}


def test_a_model_that_is_a_run_brings_its_curves(
    toy_cache: Path, toy_student: Path, make_config: MakeConfig, write_rows: WriteRows, rows: list[dict[str, Any]],
    tmp_path: Path,
) -> None:  # fmt: skip
    from dpkd.distill.options.train import TrainConfig
    from dpkd.distill.training import train

    out = tmp_path / "run"
    options = {"validation_examples": 4, "validate_every": 2, "device": "cpu", "tracker": "none"}
    train(TrainConfig(cache=str(toy_cache), student=str(toy_student), out=out, steps=4, batch_size=4, **options))
    other = _write_run(tmp_path / "other", '{"step": 1, "loss": 9.0}\n')
    config = make_config(
        model=f"m={out}", run=f"other={other}", data=f"d={write_rows(rows, 'd.jsonl')}", template="chat", seeds="10",
        max_prompt_tokens=200,
    )  # fmt: skip
    report = json.loads(evaluate(config).read_text())
    written = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert set(report["runs"]) == {"m", "other"}
    run = report["runs"]["m"]
    assert run["directory"] == str(out)
    for metric in ("loss", "kld", "rkld", "reward_margin"):
        assert run["training"][metric]["steps"] == [1, 2, 3, 4]
        assert run["training"][metric]["values"] == [line[metric] for line in written]
        assert run["validation"][metric]["steps"] == [0, 2, 4]
    page = (config.out / "report.html").read_text()
    assert "<summary>Training curves</summary>" in page
    assert 'aria-label="Reward margin by step"' in page
    assert "other, training" in (config.out / "training_curves.svg").read_text()
    # the log of a run is part of what the report is of
    (tmp_path / "other" / "metrics.jsonl").write_text('{"step": 1, "loss": 8.0}\n')
    with pytest.raises(UserError, match=r"holds another report; differing: runs\.other\.training"):
        evaluate(config)
