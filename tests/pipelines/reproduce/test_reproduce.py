"""Tables and figures of the paper from outputs of real steps: our numbers, the paper's, and their provenance."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from support.toys import ROOT

from dpkd.core.errors import UserError
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.pipelines.commands.noise import add_gaussian_noise, add_noise
from dpkd.pipelines.commands.options import NoiseConfig, PrepareConfig
from dpkd.pipelines.commands.prepare import prepare_data
from dpkd.pipelines.reproduce.options import ReproduceConfig
from dpkd.pipelines.reproduce.reproduce import build_artefact
from dpkd.pipelines.reproduce.sources import read_validations

COMMAND = "dpkd reproduce x --recipe y.toml"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of answers by two methods and two seeds to six rows, two of them in each length bucket."""
    from dpkd.evaluate.evaluation import evaluate

    folder = tmp_path_factory.mktemp("evaluation")
    golds = ["sun", "moon rises", " ".join(["word"] * 40), " ".join(["leaf"] * 50), "a " * 80, "b " * 90]
    rows = [{"id": str(n), "instruction": f"Say {n}", "output": gold.strip()} for n, gold in enumerate(golds)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, right in (("kd", 2), ("dpkd", 4)):  # so many answers are the gold response, the others share no word
        answers = [
            {"example_id": row["id"], "seed": seed, "prediction": row["output"] if n < right - (seed == 20) else "zzz"}
            for n, row in enumerate(rows)
            for seed in (10, 20)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    evaluate(
        EvalConfig.parse(
            {
                "predictions": {name: str(folder / f"{name}.jsonl") for name in ("kd", "dpkd")},
                "data": {"held": str(folder / "rows.jsonl")},
                "out": folder / "report",
                "num_sign_flips": 200,
            },
            where="test",
        )
    )
    return folder / "report"


def table(report: Path, out: Path, artefact: str, **options: Any) -> dict[str, Any]:
    """The JSON of a table of the evaluation, by model."""
    rows = {"kd": "KD", "dpkd": "DPKD"}
    values = {"artefact": artefact, "out": out, "report": report, "data": {"held": "DollyEval"}, "rows": rows} | options
    build_artefact(ReproduceConfig.parse(values, where="test"), COMMAND)
    content = json.loads((out / f"{artefact}.json").read_text())
    return {row["model"]: row["columns"] for row in content["rows"]} | {"all": content}


def test_table_1_has_ours_with_an_interval_and_the_papers(report: Path, tmp_path: Path) -> None:
    found = table(report, tmp_path, "table1", other_data="six rows of a test")
    ours = found["dpkd"]["held"]
    # 4 of 6 rows right with seed 10, 3 with seed 20
    assert ours["seeds"] == [{"seed": 10, "mean": pytest.approx(400 / 6)}, {"seed": 20, "mean": pytest.approx(50.0)}]
    assert ours["ours"]["mean"] == pytest.approx((400 / 6 + 50) / 2)
    assert ours["ours"]["low"] < ours["ours"]["mean"] < ours["ours"]["high"]
    assert (ours["paper"], found["kd"]["held"]["paper"]) == (24.6, 22.8)
    text = (tmp_path / "table1.md").read_text()
    assert "| Model | method of the paper | held | paper, DollyEval |" in text
    assert "six rows of a test" in text
    for part in (COMMAND, "held", "6 rows", "kd.jsonl", "torch"):
        assert part in text
    lines = list(csv.DictReader((tmp_path / "table1.csv").open()))
    assert [(line["model"], line["column"], line["paper_column"], line["paper"]) for line in lines] == [
        ("kd", "held", "DollyEval", "22.8"), ("dpkd", "held", "DollyEval", "24.6"),
    ]  # fmt: skip
    assert float(lines[1]["ours"]) == ours["ours"]["mean"]


def test_tables_4_and_5_go_by_the_papers_buckets(report: Path, tmp_path: Path) -> None:
    exact = table(report, tmp_path, "table4", rows={"dpkd": "DPKD"})["dpkd"]
    assert [(column, exact[column]["paper"]) for column in exact] == [
        ("[0,30) (n=2)", 5.57), ("[30,70) (n=2)", 1.85), ("[70,inf) (n=2)", 0.63),
    ]  # fmt: skip
    assert [exact[column]["ours"]["mean"] for column in exact] == [100.0, 75.0, 0.0]
    assert [seed["mean"] for seed in exact["[30,70) (n=2)"]["seeds"]] == [100.0, 50.0]
    rouge = table(report, tmp_path, "table5")["kd"]
    assert [value["paper"] for value in rouge.values()] == [28.04, 21.65, 15.07]


def test_dpkd_less_sft_is_paired_and_beside_the_papers(report: Path, tmp_path: Path) -> None:
    """Here `kd` takes the part of SFT: of six rows both have two right, and dpkd 1.5 more over its seeds."""
    found = table(report, tmp_path, "table5", rows={"kd": "SFT", "dpkd": "DPKD"})["all"]
    (difference,) = found["differences"]
    assert (difference["model"], difference["baseline"]) == ("dpkd", "kd")
    short, middle, long = difference["columns"].values()
    # kd misses the second row with one seed of two
    assert short["ours"]["mean"] == pytest.approx(25.0)
    assert middle["ours"]["mean"] == pytest.approx(75.0)
    assert long["ours"]["mean"] == 0.0
    assert [part["paper"] for part in (short, middle, long)] == [0.88, 1.41, 1.17]
    assert middle["ours"]["low"] < 75.0 < middle["ours"]["high"]
    text = (tmp_path / "table5.md").read_text()
    assert "| `dpkd` - `kd` | +25.00 [" in text
    assert "| +0.88 | +75.00 [" in text
    exact = table(report, tmp_path, "table4", rows={"kd": "SeqKD", "dpkd": "DPKD"})["all"]["differences"]
    assert [part["paper"] for part in exact[0]["columns"].values()] == [0.42, 1.85, 0.63]
    over_sets = table(report, tmp_path, "table1", rows={"kd": "SFT", "dpkd": "DPKD"})["all"]["differences"]
    assert over_sets[0]["columns"]["held"]["paper"] == 1.3
    assert over_sets[0]["columns"]["held"]["ours"]["mean"] == pytest.approx(100 * 2 / 6)
    assert table(report, tmp_path, "table1", rows={"dpkd": "DPKD"})["all"]["differences"] == []


def test_a_method_without_a_number_in_the_paper_has_an_empty_cell(report: Path, tmp_path: Path) -> None:
    found = table(report, tmp_path, "table1", paper="opt-1.3b", rows={"kd": "none", "dpkd": "DPKD"})
    assert (found["kd"]["held"]["paper"], found["dpkd"]["held"]["paper"]) == (None, 27.2)
    assert "| `kd` | - |" in (tmp_path / "table1.md").read_text()


def texts_of(svg: Path) -> str:
    """All text of an SVG, which parses."""
    return "\n".join(part for part in ET.parse(svg).getroot().itertext() if part.strip())


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_figure_5_is_table_5_as_bars(report: Path, tmp_path: Path) -> None:
    table(report, tmp_path / "opt", "fig5", paper="opt-1.3b")  # of which the paper has no numbers by length
    assert "paper" not in texts_of(tmp_path / "opt" / "fig5.svg").split()
    found = table(report, tmp_path, "fig5")
    assert [value["paper"] for value in found["dpkd"].values()] == [30.98, 26.69, 17.26]
    assert is_png(tmp_path / "fig5.png")
    shown = texts_of(tmp_path / "fig5.svg")
    for part in ("paper", "[30,70) (n=2)", COMMAND, "6 rows", "seeds"):
        assert part in shown


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, toy_cache: Path, toy_student: Path, toy_teacher: Path
) -> tuple[Path, Path]:
    """Two trainings of pairs that follow each other, validated at every second step."""
    from dpkd.distill import TrainConfig, train

    folder = tmp_path_factory.mktemp("runs")
    student = str(toy_student)
    for name in ("one", "two"):
        config = {
            "cache": toy_cache, "student": student, "round": "r0", "out": folder / name, "level": "sequence",
            "epochs": 1, "batch_size": 8, "validation_examples": 4, "validate_every": 2, "save_every": None,
            "responses": "all", "tracker": "none", "device": "cpu", "learning_rate": 1e-3,
        }  # fmt: skip
        train(TrainConfig.parse(config, where="test"))
        student = str(folder / name)
    return folder / "one", folder / "two"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def validations(run: Path) -> list[dict[str, Any]]:
    """All but the validation before the first step."""
    first, *others = lines_of(run / "validation.jsonl")
    assert first["step"] == 0
    return others


def test_runs_that_follow_each_other_are_one_curve(runs: tuple[Path, Path]) -> None:
    first, second = map(validations, runs)
    steps = first[-1]["step"]  # 32 rows of training, 8 a step
    assert steps == 4
    joined = read_validations(runs)
    assert [line["step"] for line in joined] == [2, 4, 6, 8]
    assert [line["epoch"] for line in joined] == [1, 1, 2, 2]
    assert [line["reward_chosen"] for line in joined] == [line["reward_chosen"] for line in first + second]


def test_figures_3_and_4_show_the_validations(runs: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("fig3", "fig4"):
        config = ReproduceConfig.parse({"artefact": name, "out": tmp_path, "runs": {"dpkd": list(runs)}}, where="test")
        build_artefact(config, COMMAND)
        content = json.loads((tmp_path / f"{name}.json").read_text())
        expected = [line for run in runs for line in validations(run)]
        for key in ("rkld_first", "kld_first", "reward_chosen"):
            assert [point[key] for point in content["runs"]["dpkd"]] == [line[key] for line in expected]
        assert is_png(tmp_path / f"{name}.png")
        shown = texts_of(tmp_path / f"{name}.svg")
        for part in (COMMAND, "held-out examples", "sequence level", "torch", str(runs[1]), "40 rows", "toy-teacher"):
            assert part in shown


def test_table_3_reads_the_least_rkld_and_the_largest_reward(
    report: Path, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    found = table(report, tmp_path, "table3", rows={"dpkd": "DPKD"}, runs={"dpkd": list(runs)})["dpkd"]
    expected = [line for run in runs for line in validations(run)]
    assert found["rKLD min"]["ours"] == {
        "mean": min(line["rkld_first"] for line in expected),
        "low": None,
        "high": None,
    }
    assert found["reward max"]["ours"]["mean"] == max(line["reward_chosen"] for line in expected)
    assert [found[column]["paper"] for column in found] == [24.62, 0.07, 0.97]
    # Eq. 29 on the teacher's responses is -beta KL on average: it cannot be 0.97
    assert found["reward max"]["ours"]["mean"] < 0
    notes = json.loads((tmp_path / "table3.json").read_text())["notes"]
    assert any("reward max is not comparable" in note for note in notes)
    with pytest.raises(UserError, match=r"a row of table3 has no run: found 'kd', expected runs\.kd"):
        table(report, tmp_path, "table3", runs={"dpkd": list(runs)}, rows={"kd": "DPKD"})


def test_missing_and_empty_outputs_are_named(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=r"the output of a step is missing .*none/metrics\.jsonl"):
        read_validations((tmp_path / "none",))
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "metrics.jsonl").write_text((runs[0] / "metrics.jsonl").read_text())
    line = validations(runs[0])[0] | {"rkld_first": None}
    (copy / "validation.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match="the validations have no rkld_first"):
        read_validations((copy,))
    (copy / "validation.jsonl").write_text("")
    with pytest.raises(UserError, match="the log of a run is empty"):
        read_validations((copy,))


def test_noise_has_the_size_that_is_asked_for(toy_teacher: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = dict(AutoModelForCausalLM.from_pretrained(toy_teacher).named_parameters())

    def noise(scale: float, seed: int) -> dict[str, torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(toy_teacher)
        add_gaussian_noise(model, scale, seed)
        return {name: (value - plain[name]).detach() for name, value in model.named_parameters()}

    small, large, other = noise(0.1, 0), noise(0.2, 0), noise(0.1, 1)
    for name, value in small.items():
        if value.dim() == 1:
            assert not value.any()  # norms
            continue
        size = float(plain[name].detach().square().mean().sqrt())
        assert float(value.std()) == pytest.approx(0.1 * size, rel=0.1)
        assert abs(float(value.mean())) < 5 * 0.1 * size / value.numel() ** 0.5
        torch.testing.assert_close(large[name], 2 * value, rtol=1e-3, atol=1e-6)  # the same direction
        correlation = torch.corrcoef(torch.stack([value.flatten(), other[name].flatten()]))[0, 1]
        assert abs(float(correlation)) < 5 / value.numel() ** 0.5


def test_noise_is_measured_once_and_stays_what_it_is(
    tmp_path: Path, toy_teacher: Path, toy_student: Path, toy_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"model": str(toy_teacher), "cache": toy_cache, "out": tmp_path / "n", "scales": [0, 0.3], "seeds": [5]}
    config = NoiseConfig.parse({**options, "cache_rows": 12, "beta": 0.5, "device": "cpu"}, where="test")
    path = add_noise(config)
    plain, noisy = json.loads(path.read_text())["copies"]
    # the model is the cache's own teacher: nothing between them but the grid of the cache
    assert abs(plain["rkld_first"]) < 1e-4
    assert abs(plain["reward"]) < 1e-4
    assert noisy["rkld_first"] > 0.01
    assert noisy["reward"] < -0.01
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "n").glob("scale-*/*")}
    add_noise(config)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "n").glob("scale-*/*")} == before
    with pytest.raises(UserError, match="holds another copy; differing: model"):
        add_noise(config.model_copy(update={"model": str(toy_student)}))


def test_rows_are_kept_by_the_words_of_their_response(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "a", "output": "ten words are not enough to be kept here now", "kept": False},
        {"instruction": "b", "output": "but eleven words are enough to be kept in this file", "extra": {"x": "\u2028"}},
        {"instruction": "c"},
        {"instruction": "d", "output": ["one " * 12, "two"]},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    options = {"data": data, "out": tmp_path / "kept.jsonl", "min_response_words": 11}
    kept = prepare_data(PrepareConfig.parse(options, where="test"))
    assert lines_of_text(kept) == [rows[1], rows[3]]
    assert prepare_data(PrepareConfig.parse(options, where="test")) == kept
    with pytest.raises(UserError, match="the output exists and holds other rows"):
        prepare_data(PrepareConfig.parse(options | {"limit": 1}, where="test"))
    text = PrepareConfig.parse(options | {"out": tmp_path / "text.jsonl", "form": "text", "limit": 1}, where="test")
    assert lines_of_text(prepare_data(text)) == [{"text": rows[1]["output"]}]
    with pytest.raises(
        UserError, match=r"no row of the data is long enough: expected a reference response of 99 words"
    ):
        prepare_data(PrepareConfig.parse(options | {"min_response_words": 99}, where="test"))
    with pytest.raises(UserError, match="only JSON lines can be filtered"):
        prepare_data(PrepareConfig.parse(options | {"data": tmp_path / "rows.json"}, where="test"))
    with pytest.raises(UserError, match="the output is the data itself"):
        prepare_data(PrepareConfig.parse(options | {"out": data}, where="test"))


def lines_of_text(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.engine
def test_a_shipped_recipe_runs_to_its_figure(tmp_path: Path, teacher_dir: Path) -> None:
    """Of the real teacher only the tokenizer is used; the model is random, made by a step of the recipe."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    command = "dpkd reproduce fig2 --recipe paper/fig2-toy"
    words = [sys.executable, "-m", "dpkd.pipelines.cli", *command.split()[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "paper" / "toy" / "fig2"
    assert done.stdout.splitlines()[-3:] == [f"runs/paper/toy/fig2/fig2.{kind}" for kind in ("png", "svg", "json")]
    content = json.loads((out / "fig2.json").read_text())
    plain, *noisy = content["points"]
    assert [(point["scale"], point["seed"]) for point in noisy] == [(0.5, 0), (0.5, 1)]
    assert abs(plain["rkld"]) < 1e-4
    assert all(point["rkld"] > 0.001 and point["reward"] < -0.001 for point in noisy)
    assert all([seed["seed"] for seed in point["seeds"]] == [10, 20] for point in content["points"])
    assert is_png(out / "fig2.png")
    shown = texts_of(out / "fig2.svg")
    weights = json.loads((tmp_path / "runs/paper/toy/noise/noise.json").read_text())["model"]["weights_sha256"]
    for part in (command, "6 rows", "temperature 1", "seeds 10, 20", "scale-0.5-seed-1", weights[:12], "6.23"):
        assert part in shown
