"""Recipes for the paper's tables and figures: their format, its errors, and the shipped recipes."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from support.toys import ROOT

from dpkd.core.errors import UserError
from dpkd.pipelines.commands.options import ARTEFACTS, NoiseConfig, ReproduceOptions
from dpkd.pipelines.planning.model_sizes import ModelSizes
from dpkd.pipelines.planning.plan import plan_steps
from dpkd.pipelines.planning.text import plan_text
from dpkd.pipelines.recipe.format import read_recipe
from dpkd.pipelines.recipe.shipped import find_recipe
from dpkd.pipelines.reproduce.inputs import check_inputs
from dpkd.pipelines.reproduce.options import read_reproduce
from dpkd.pipelines.reproduce.paper_values import paper_values
from dpkd.pipelines.reproduce.reproduce import reproduce, run

PAPER = ROOT / "recipes" / "paper"
SHIPPED = sorted(PAPER.glob("*.toml"))
LEADING = [path for path in SHIPPED if "reproduce" in tomllib.loads(path.read_text())]


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def options_of(path: Path) -> list[dict[str, Any]]:
    return [step.config.model_dump(mode="json") for step in read_recipe(path)]


START = '[[steps]]\ncommand = "init-student"\nteacher = "t"\nout = "s"\nlayers = 1\nkeep = "last"\n'
TRAIN = '[[steps]]\ncommand = "train"\ncache = "c"\nstudent = "s"\nout = "{0}"\n'


def test_included_steps_come_first_and_once(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", START)
    write(tmp_path / "b.toml", 'include = ["a.toml"]\n' + TRAIN.format("b"))
    write(tmp_path / "c.toml", 'include = ["a.toml"]\n' + TRAIN.format("c"))
    both = write(tmp_path / "d.toml", 'include = ["b.toml", "c.toml"]\n')
    assert [step["out"] for step in options_of(both)] == ["s", "b", "c"]


def test_defaults_are_of_one_command_and_one_file(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", "[defaults.train]\nbeta = 0.7\nsteps = 3\n" + TRAIN.format("a") + "steps = 5\n")
    path = write(tmp_path / "b.toml", 'include = ["a.toml"]\n' + TRAIN.format("b"))
    found = options_of(path)
    assert [(step["beta"], step["steps"]) for step in found] == [(0.7, 5), (1.0, None)]


VARIANTS = """
[rounds]
count = 2
student = "first"

[variants.plain]

[variants.smooth]
label_smoothing = 0.2

[[steps]]
repeat = "rounds"
command = "train"
cache = "c"
student = "{student}"
level = "sequence"
round = "{variant}-{round}"
out = "{variant}-{round}"
"""


def test_each_variant_repeats_the_rounds_from_the_first_student(tmp_path: Path) -> None:
    steps = read_recipe(write(tmp_path / "r.toml", VARIANTS))
    assert [step.title for step in steps] == [
        "train, plain, round 0", "train, plain, round 1", "train, smooth, round 0", "train, smooth, round 1",
    ]  # fmt: skip
    found = [step.config.model_dump(mode="json") for step in steps]
    assert [step["student"] for step in found] == ["first", "plain-0", "first", "smooth-0"]
    assert [step["label_smoothing"] for step in found] == [None, None, 0.2, 0.2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('include = ["r.toml"]\n', "the recipe includes itself"),
        ("include = 3\n", "`include` is not a list of recipes"),
        ('include = ["none.toml"]\n', "the config file is missing .*none.toml"),
        ("[defaults.train]\nbeta = 1\n" + START, "\\[defaults\\] for a command that no step runs: found 'train'"),
        ("[defaults.train]\nbeeta = 1\n" + TRAIN.format("o"), "unknown option `beeta`"),
        ("[defaults]\ntrain = 1\n" + TRAIN.format("o"), "`defaults` contains something other than tables"),
        ("[variants.a]\n" + TRAIN.format("o"), r"\[variants\] without \[rounds\]"),
        (VARIANTS.replace("variants.plain", 'variants."a/b"'), "a variant's name cannot be part of a path"),
        (
            VARIANTS.replace('out = "{variant}-{round}"', 'out = "o-{round}"'),
            "same output in rounds 0 of plain and 0 of",
        ),
        (VARIANTS + TRAIN.format("{student}"), r"\{student\} has no value here"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_recipe(write(tmp_path / "r.toml", content))


def test_every_artefact_has_a_recipe_and_a_tiny_version() -> None:
    made = {(tomllib.loads(path.read_text())["reproduce"]["artefact"], "tiny" in path.name) for path in LEADING}
    assert made == {(name, tiny) for name in ARTEFACTS for tiny in (True, False)}
    families = {tomllib.loads(path.read_text())["reproduce"].get("paper") for path in PAPER.glob("table1-*.toml")}
    assert {"gpt2-120m", "gpt2-340m", "opt-1.3b"} <= families


@pytest.mark.parametrize("path", LEADING, ids=lambda path: path.stem)
def test_shipped_recipes_lead_to_their_artefact_and_can_be_planned(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dry runs in an empty directory, without models and data; nothing is written."""
    header = path.read_text().split("\n\n")[0]
    command = re.search(r"dpkd reproduce (\w+) --recipe (\S+)", header)
    assert command is not None
    assert command[2] == f"paper/{path.stem}"
    monkeypatch.chdir(tmp_path)
    reproduce(command[1], command[2], dry_run=True)
    shown = capsys.readouterr().out
    steps = read_recipe(path)
    assert f"{len(steps)} of {len(steps)} steps to do" in shown
    assert f"models trained: {sum(step.command == 'train' for step in steps)}" in shown
    assert "missing: model models/" in shown
    assert list(tmp_path.iterdir()) == []
    if "tiny" not in path.stem and "toy" not in path.stem:
        assert "never run here" in header or "seconds after" in header
        assert "an unknown number" not in shown  # the recipe has assumptions for files that do not exist
    with pytest.raises(UserError, match=r"inputs of the recipe are missing: found no model models/\S+ \((hf|bash) "):
        check_inputs(steps, read_reproduce(path, steps))


@pytest.mark.parametrize("path", LEADING, ids=lambda path: path.stem)
def test_the_header_has_the_papers_numbers(path: Path) -> None:
    config = read_reproduce(path, read_recipe(path))
    if config.artefact in ("fig1", "fig2", "fig3", "fig4"):
        return  # the paper prints no numbers, or only two, which the header has
    if "tiny" in path.stem and config.artefact == "table1":
        return  # covers three families, whose recipes have the numbers
    header = path.read_text().split("\ninclude")[0]
    for method, values in paper_values(config.artefact, config.paper).items():
        for column, value in values.items():
            numbers = [] if value is None else [f"{value:.1f}", f"{value:.2f}"]
            assert value is None or any(number in header for number in numbers), (method, column)


PLANNED = """
[[steps]]
command = "cache-teacher"
teacher = "teacher"
data = "data.jsonl"
out = "cache"
limit = 8
responses = "both"
num_samples = 2
max_new_tokens = 10
top_k = 0

[[steps]]
command = "train"
cache = "cache"
student = "teacher"
out = "run"
epochs = 3
batch_size = 4
save_every = "none"
validation_examples = 4

[[steps]]
command = "eval"
out = "report"
seeds = [1, 2, 3]
max_new_tokens = 7

[steps.model]
teacher = "teacher"
run = "run"

[steps.data]
held = "data.jsonl"

[[steps]]
command = "judge"
report = "report"
out = "judge"
judge_url = "http://h/v1"
judge_model = "gpt"
sample = 5
mode = "pairwise"
max_tokens = 50
price_in = 10
price_out = 20
"""


def test_the_plan_counts_what_the_options_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_teacher: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 12)
    (tmp_path / "teacher").symlink_to(toy_teacher)
    steps = read_recipe(write(tmp_path / "r.toml", PLANNED))
    cache, train, evaluation, judge = plan_steps(steps, {})
    assert cache.cached == 8 * 2 + 8  # two samples and one reference a row
    assert cache.generated == 8 * 2 * 10
    assert train.steps == 15  # ceil(3 * (24 - 4) / 4)
    # a Llama of hidden size 64 (2 heads, 1 of them for keys), MLP 128, vocabulary 600, two layers, tied embeddings
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64
    assert train.disk == 4 * (600 * 64 + 2 * layer + 64)
    assert evaluation.generated == 2 * 3 * 12 * 7
    size = 600 * 64 + 2 * layer + 64
    # 6 operations per weight and token of 15 steps of 4 rows of up to 256 + 10 tokens, 2 for the answers of two models
    assert train.flop == 6 * size * 15 * 4 * 266
    assert evaluation.flop == 2 * 2 * size * 12 * 3 * (256 + 7)
    # one pair of models in both orders for five rows; up to 400 + 256 + 3 * 7 tokens of a prompt, 50 of a reply
    assert judge.questions == 10
    assert "10 questions: up to 6,770 tokens of prompts and 500 of replies, 0.08 at most" in judge.words
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert [item.finished for item in plan_steps(steps, {})] == [False, True, False, False]
    text = plan_text(plan_steps(steps, {}))
    assert "3 of 4 steps to do" in text
    assert "questions to a judge: 10" in text


@pytest.mark.parametrize("family", ["gpt2-120m", "gpt2-340m", "opt-1.3b"])
def test_minillm_has_the_steps_of_dpkd(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = read_reproduce(find_recipe(f"paper/table1-{family}"), read_recipe(f"paper/table1-{family}"))
    planned = plan_steps(read_recipe(f"paper/table1-{family}"), config.assume)
    steps = {
        name: [item.steps for item in planned if re.search(rf"/{name}-\d+$", item.step.out)]
        for name in ("dpkd", "minillm")
    }
    assert steps["minillm"] == steps["dpkd"]
    assert not any(map(math.isnan, steps["dpkd"]))


def test_without_a_recipe_those_of_the_artefact_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    run(ReproduceOptions(artefact="table1"))
    names = [line.split("  ")[0].strip() for line in capsys.readouterr().out.splitlines()]
    assert names == [f"paper/table1-{name}" for name in ("gpt2-120m", "gpt2-340m", "opt-1.3b", "tiny")]
    run(ReproduceOptions(artefact="fig2"))
    assert "paper/fig2 " in capsys.readouterr().out


def test_repeated_rounds_are_folded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    lines = plan_text(plan_steps(read_recipe("paper/table1-gpt2-120m"), {})).splitlines()
    shown = [line.split(" -> ")[-1] for line in lines if " -> " in line]
    assert {f"runs/paper/gpt2-120m/{name}" for name in ("dpkd-0", "minillm-0", "kd", "report")} <= set(shown)
    assert "runs/paper/gpt2-120m/dpkd-2" not in shown
    folded = [line for line in lines if "and the same in" in line]
    assert [re.sub(r"\d+", "N", line.strip()) for line in folded] == [
        "and the same in N more steps, up to runs/paper/gptN-Nm/dpkd-N",
        "and the same in N more steps, up to runs/paper/gptN-Nm/minillm-N",
    ]
    # what is shown and what is folded are all steps
    assert len(shown) + sum(int(line.split()[4]) for line in folded) == len(read_recipe("paper/table1-gpt2-120m"))


def test_sizes_are_told_from_configs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2", "n_layer": 12}')
    text = START.replace('"t"', '"gpt2"').replace("layers = 1", "layers = 6") + TRAIN.format("run")
    sizes = ModelSizes(read_recipe(write(tmp_path / "r.toml", text)), {"far": 7})
    assert sizes.of("gpt2") == 124_439_808  # OpenAI's GPT-2
    assert sizes.of("run") == sizes.of("s") == 81_912_576  # DistilGPT2, which has six of its layers
    assert (sizes.of("far"), sizes.of("nowhere")) == (7, None)


def edited(tmp_path: Path, name: str, old: str, new: str) -> Path:
    """A shipped recipe with a change, in a directory with the recipes that it includes."""
    for path in SHIPPED:
        (tmp_path / path.name).write_text(path.read_text())
    text = (tmp_path / name).read_text()
    assert old in text
    return write(tmp_path / name, text.replace(old, new))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("table1-tiny.toml", "[reproduce]", "[rounds2]", "unknown key 'rounds2'"),
        ("table1-tiny.toml", 'report = "runs/paper/tiny/report"', "", "table1 needs `report`"),
        (
            "table1-tiny.toml",
            'artefact = "table1"',
            'artefact = "table1"\nnoise = "n"',
            "table1 is not made from `noise`",
        ),
        (
            "table1-tiny.toml",
            'report = "runs/paper/tiny/report"',
            'report = "r"',
            "no eval step writes it: found r, exp",
        ),
        ("table1-tiny.toml", 'kd = "KD"', 'kd = "KDD"', "the paper's table1 has no 'KDD', but Teacher, SFT"),
        ("table1-tiny.toml", '\nkd = "KD"', '\nkdd = "KD"', "the eval step has no such name: found 'kdd'"),
        ("table1-tiny.toml", 'dolly-heldout = "DollyEval"', 'other = "DollyEval"', "no such name: found 'other'"),
        ("table1-tiny.toml", "limit = 32\n", "limit = 32\nbuckets = [10]\n", None),
        ("fig2-tiny.toml", "seeds = [0, 1]", "seeds = [0, 3]", "a copy with noise is not evaluated: found .*seed-3"),
        ("fig4-tiny.toml", "tiny/dpkd-1", "tiny/dpkd-7", "no train step writes it: found runs/paper/tiny/dpkd-7"),
        (
            "dpkd-tiny.toml",
            'validation_examples = 24\nbest_metric = "last"\nvalidate_every = 2',
            'validation_examples = 0\nbest_metric = "last"',
            None,
        ),
        ("fig4-tiny.toml", 'artefact = "fig4"', 'artefact = "fig9"', "`artefact` must be table1, .*found fig9"),
    ],
)
def test_a_recipe_that_cannot_lead_there_is_refused(
    tmp_path: Path, name: str, old: str, new: str, message: str | None
) -> None:
    path = edited(tmp_path, name, old, new)
    if message is None:  # the change is in a recipe that others include
        path, message = {
            "table1-tiny.toml": (tmp_path / "table5-tiny.toml", "the eval step's buckets are not the paper's"),
            "dpkd-tiny.toml": (tmp_path / "fig3-tiny.toml", "the run is not validated, so it has nothing to show"),
        }[name]
    with pytest.raises(UserError, match=message):
        read_reproduce(path, read_recipe(path))


def test_a_recipe_leads_to_one_artefact(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="makes another table or figure: found fig3, expected fig4"):
        reproduce("fig4", PAPER / "fig3-tiny.toml", dry_run=True)
    with pytest.raises(UserError, match="the recipe makes no table or figure"):
        reproduce("fig4", write(tmp_path / "r.toml", START), dry_run=True)


def test_copies_have_a_place_for_each_scale_and_seed() -> None:
    config = NoiseConfig.parse({"model": "m", "cache": "c", "out": "o", "scales": "0,0.5", "seeds": "3,4"}, where="t")
    assert {key: str(path) for key, path in config.copies().items()} == {
        (0.0, 3): "o/scale-0-seed-3",  # without noise all seeds are one copy
        (0.5, 3): "o/scale-0.5-seed-3",
        (0.5, 4): "o/scale-0.5-seed-4",
    }
    with pytest.raises(UserError, match="a value is given twice in 1,1"):
        NoiseConfig.parse({"model": "m", "cache": "c", "out": "o", "seeds": "1,1"}, where="t")
