"""Merging evaluations: the numbers of a single evaluation, and an error for what cannot be compared."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import dpkd

from dpkd.core.errors import UserError
from dpkd.evaluate.evaluation import evaluate
from dpkd.evaluate.merge.merge import merge
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.evaluate.options.merge import MergeConfig

Evaluate = Callable[..., Path]
Answers = Callable[[str, int], str]
Single = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluations")


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


_ROWS = [
    {"id": f"row-{i}", "instruction": f"Say {i}", "output": " ".join(["word"] * words), "category": "qa"}
    for i, words in enumerate((2, 30, 70, 2, 30, 70))
]


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return _write(folder / "d.jsonl", _ROWS)


@pytest.fixture(scope="module")
def other_data(folder: Path) -> Path:
    return _write(folder / "e.jsonl", [row | {"instruction": "Else"} for row in _ROWS])


@pytest.fixture(scope="module")
def answers(folder: Path) -> Answers:
    """`NAME=FILE` of predictions by two seeds: right on every `period`-th row, half right on the others."""

    def make(name: str, period: int) -> str:
        lines = [
            {"prediction": row["output"] if (i + seed) % period == 0 else "word and more", "seed": seed}
            for seed in (10, 20)
            for i, row in enumerate(_ROWS)
        ]
        return f"{name}={_write(folder / f'{name}-{period}.jsonl', lines)}"

    return make


@pytest.fixture(scope="module")
def run_eval(folder: Path) -> Evaluate:
    """The directory of an evaluation, which is made once for all tests; a test that changes it takes a copy."""

    def run(out: str, **options: Any) -> Path:
        config = EvalConfig.parse({"num_sign_flips": 200, "out": folder / out, **options}, where="a test")
        return evaluate(config).parent

    return run


@pytest.fixture(scope="module")
def single(run_eval: Evaluate, data: Path, answers: Answers) -> Single:
    """An evaluation of one set of predictions by its name."""
    periods = {"a": 2, "b": 3, "c": 5}
    return lambda name: run_eval(name, predictions=answers(name, periods[name]), data=f"d={data}")


def _merge(out: Path, *places: object, **options: Any) -> dict[str, Any]:
    given = {"evaluations": [str(place) for place in places], "out": out, "num_sign_flips": 200, **options}
    report: dict[str, Any] = json.loads(merge(MergeConfig.parse(given, where="a test")).read_text(encoding="utf-8"))
    return report


def test_a_merged_report_has_the_numbers_of_one_evaluation_of_all(
    data: Path, answers: Answers, run_eval: Evaluate, tmp_path: Path
) -> None:
    given = {name: answers(name, period) for name, period in (("a", 2), ("b", 3), ("c", 5))}
    together = run_eval("all", predictions=list(given.values()), data=f"d={data}", train_data=str(data))
    apart = [run_eval("one", predictions=[given["a"]], data=f"d={data}", train_data=str(data))]
    apart.append(run_eval("two", predictions=[given["b"], given["c"]], data=f"other-name={data}"))
    merged = _merge(tmp_path / "merged", *apart)
    whole = json.loads((together / "report.json").read_text())
    assert set(merged) == set(whole)
    for key in ("models", "comparisons", "data", "duplicates", "skipped", "significance"):
        assert merged[key] == whole[key], key
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {path.name for path in together.iterdir()}
    assert [part["directory"] for part in merged["merged"]] == [str(place) for place in apart]
    assert merged["command"].startswith(f"dpkd report {apart[0]} {apart[1]} --out ")
    assert f"From {apart[0]}" in (tmp_path / "merged" / "report.html").read_text()


def test_a_merged_report_is_made_once_and_can_be_merged_again(
    single: Single, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [Path(shutil.copytree(single("a"), tmp_path / "a")), single("b")]
    out = tmp_path / "merged"
    first = _merge(out, *places)
    written_ns = (out / "report.html").stat().st_mtime_ns
    capsys.readouterr()
    assert _merge(out, *places) == first
    assert "is complete already" in capsys.readouterr().err
    assert (out / "report.html").stat().st_mtime_ns == written_ns
    with pytest.raises(UserError, match=r"holds another report; differing: evaluations: .*Choose another --out"):
        _merge(out, *places, single("c"))
    again = _merge(tmp_path / "again", out, single("c"))
    assert list(again["models"]) == ["a", "b", "c"]
    assert again["models"]["a"] == first["models"]["a"]
    # an evaluation that was made anew under the same path is another one
    shutil.rmtree(places[0])
    shutil.copytree(single("c"), places[0])
    with pytest.raises(UserError, match="holds another report"):
        _merge(out, *places)


def test_sets_of_different_models_are_all_in_the_report(
    data: Path, other_data: Path, answers: Answers, run_eval: Evaluate, tmp_path: Path
) -> None:
    one = run_eval("a-and-b", predictions=[answers("a", 2), answers("b", 3)], data=f"d={data}")
    two = run_eval("a-on-e", predictions=answers("a", 2), data=f"e={other_data}")
    merged = _merge(tmp_path / "merged", one, two)
    assert {name: list(model["data"]) for name, model in merged["models"].items()} == {"a": ["d", "e"], "b": ["d"]}
    assert [len(found) for found in merged["comparisons"].values()] == [1, 0]
    assert "## e (6 rows)" in (tmp_path / "merged" / "report.md").read_text()


def test_conflicting_names_can_be_renamed(
    data: Path, answers: Answers, run_eval: Evaluate, single: Single, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = single("a"), run_eval("a-and-k", predictions=[answers("a", 3), answers("k", 2)], data=f"d={data}")
    with pytest.raises(UserError, match=rf"the name 'a' .*\(other answers\).*found {two}.*Rename .*: a-and-k={two}"):
        _merge(tmp_path / "no", one, two)
    assert not (tmp_path / "no").exists()
    renamed = _merge(tmp_path / "renamed", f"new={one}", f"more={two}")
    assert list(renamed["models"]) == ["new", "more.a", "more.k"]
    assert (renamed["comparisons"]["d"][0]["model"], renamed["comparisons"]["d"][0]["baseline"]) == ("more.a", "new")
    copy = Path(shutil.copytree(one, tmp_path / "copy"))
    capsys.readouterr()
    assert list(_merge(tmp_path / "same", one, copy)["models"]) == ["a"]
    assert "used once" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"the name 'a b' must start with a letter"):
        _merge(tmp_path / "no", f"a b={one}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rouge_tokenizer": "whitespace"}, r"scored with another `rouge_tokenizer`: found whitespace.*default as in"),
        ({"bucket_of": "prediction"}, r"scored with another `bucket_of`: found prediction in .*, expected reference"),
        ({"buckets": "10,50"}, r"set d has other buckets: found edges \[10, 50\].*expected \[30, 70\] as in"),
        ({"limit": 5}, r"set d have different rows: found 5 in .*, expected 6 as in .*; only one has 'row-5'"),
    ],
)
def test_what_does_not_compare_is_refused(
    data: Path, folder: Path, run_eval: Evaluate, single: Single, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    num_rows = options.get("limit", 6)
    given = _write(folder / f"short-{num_rows}.jsonl", [{"prediction": "word"}] * num_rows)
    two = run_eval("-".join(options), predictions=f"b={given}", data=f"d={data}", **options)
    with pytest.raises(UserError, match=message):
        _merge(tmp_path / "no", single("a"), two)
    assert not (tmp_path / "no").exists()


def test_other_data_of_one_name_is_refused(
    other_data: Path, answers: Answers, run_eval: Evaluate, single: Single, tmp_path: Path
) -> None:
    other = run_eval("other-d", predictions=answers("b", 3), data=f"d={other_data}")
    with pytest.raises(UserError, match=r"two sets with different content have the name 'd': found sha.* --data OTHER"):
        _merge(tmp_path / "no", single("a"), other)


def test_common_rows_are_compared_when_asked(
    data: Path, folder: Path, run_eval: Evaluate, single: Single, tmp_path: Path
) -> None:
    given = _write(folder / "p.jsonl", [{"prediction": "word word"}] * 4)
    two = run_eval("four", predictions=f"p={given}", data=f"d={data}", limit=4)
    merged = _merge(tmp_path / "merged", single("a"), two, common_rows=True)
    assert (merged["data"]["d"]["n"], merged["data"]["d"]["num_not_common"]) == (4, 2)
    assert {model["data"]["d"]["n"] for model in merged["models"].values()} == {4}
    # two of the four references are "word word"
    assert merged["models"]["p"]["data"]["d"]["exact_match"]["mean"] == 50.0
    assert "4 rows, 2 more in only some of the evaluations" in (tmp_path / "merged" / "report.md").read_text()


def test_rows_without_a_reference_are_counted_among_those_left_out(
    folder: Path, run_eval: Evaluate, tmp_path: Path
) -> None:
    data = _write(folder / "gaps.jsonl", [*_ROWS[:2], {"instruction": "x", "id": "x"}, {"instruction": "y", "id": "y"}])
    given = [_write(folder / f"gaps-{num}.jsonl", [{"prediction": "word"}] * num) for num in (4, 3)]
    all_rows = run_eval("gaps", predictions=f"a={given[0]}", data=f"d={data}")
    three = run_eval("gaps-3", predictions=f"b={given[1]}", data=f"d={data}", limit=3)
    merged = _merge(tmp_path / "merged", all_rows, three, common_rows=True)
    assert len(merged["skipped"]["d"]) == merged["data"]["d"]["num_without_reference"] == 1
    text = (tmp_path / "merged" / "report.md").read_text()
    assert "2 rows, 1 left out, 1 of them without a reference)" in text


def test_answers_that_were_drawn_otherwise_compare_when_asked(
    toy_teacher: Path, toy_student: Path, data: Path, run_eval: Evaluate, single: Single, tmp_path: Path
) -> None:
    short = {"engine": "transformers", "template": "raw", "max_new_tokens": 4, "device": "cpu", "data": f"d={data}"}
    greedy = run_eval("greedy", model=f"t={toy_teacher}", temperature=0, **short)
    sampled = run_eval("sampled", model=f"s={toy_student}", seeds="10", **short)
    with pytest.raises(
        UserError,
        match=r"with different `temperature`: found 1\.0 for s in .*sampled, expected 0\.0 as for t in .*greedy"
        r".*--allow-different-decoding",
    ):
        _merge(tmp_path / "no", greedy, sampled, single("a"))
    _merge(tmp_path / "merged", greedy, sampled, single("a"), allow_different_decoding=True)
    text = (tmp_path / "merged" / "report.md").read_text()
    assert "t: template raw, greedy, seed 10, at most 4 tokens; s: template raw, temperature 1" in text
    assert "a: given as text" in text


def test_given_texts_compare_with_any_decoding(
    toy_teacher: Path, data: Path, run_eval: Evaluate, single: Single, tmp_path: Path
) -> None:
    short = {"engine": "transformers", "template": "raw", "max_new_tokens": 4, "device": "cpu", "data": f"d={data}"}
    greedy = run_eval("greedy", model=f"t={toy_teacher}", temperature=0, **short)
    assert list(_merge(tmp_path / "fine", greedy, single("a"))["models"]) == ["t", "a"]


def test_what_is_no_finished_evaluation_is_refused(single: Single, tmp_path: Path) -> None:
    place = Path(shutil.copytree(single("a"), tmp_path / "a"))
    report_path, rows_path = place / "report.json", place / "per_example.parquet"
    report, content = report_path.read_text(), rows_path.read_bytes()
    with pytest.raises(UserError, match=r"holds no finished evaluation: found no such directory \(in .*none\)"):
        _merge(tmp_path / "no", tmp_path / "none")
    report_path.unlink()
    with pytest.raises(UserError, match=r"holds no finished evaluation: found no report\.json.*finished `dpkd eval`"):
        _merge(tmp_path / "no", place)
    report_path.write_text("{")
    with pytest.raises(UserError, match="the report cannot be read"):
        _merge(tmp_path / "no", place)
    report_path.write_text('{"format_version": 2}')
    with pytest.raises(UserError, match=r"has another format: found 2, expected 4 .*--generations reuses its answers"):
        _merge(tmp_path / "no", place)
    report_path.write_text(report.replace('"n": 6', '"n": 9'))
    with pytest.raises(UserError, match=r"do not match its report: model a, data d: found 12 rows, expected 18"):
        _merge(tmp_path / "no", place)
    report_path.write_text(report)
    rows_path.write_bytes(content[:100])
    with pytest.raises(UserError, match="the evaluation's rows cannot be read"):
        _merge(tmp_path / "no", place)
    rows_path.unlink()
    with pytest.raises(UserError, match=r"has no per_example\.parquet"):
        _merge(tmp_path / "no", place)
    with pytest.raises(UserError, match="the evaluation 'x' is given twice"):
        _merge(tmp_path / "no", "x", "x")
    assert not (tmp_path / "no").exists()


def test_the_command_merges_and_names_its_mistakes(single: Single, tmp_path: Path) -> None:
    merged = dpkd(
        "report", single("a"), f"bee={single('b')}", "--out", tmp_path / "merged", "--set", "num_sign_flips=100"
    )
    assert merged.returncode == 0, merged.stderr
    assert "| `bee` - `a` | " in merged.stdout
    command = json.loads((tmp_path / "merged" / "report.json").read_text())["command"]
    again = dpkd(*shlex.split(command)[1:])
    assert "is complete already" in again.stderr
    refused = dpkd("report", tmp_path / "none", "--out", tmp_path / "no")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: the directory holds no finished evaluation: found no such directory")
    nothing = dpkd("report", "--out", tmp_path / "no")
    assert nothing.returncode == 2
    assert "DIR... is required" in nothing.stderr


def test_a_recipe_can_end_in_a_merged_report(
    single: Single, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dpkd.pipelines.commands.options import RunOptions
    from dpkd.pipelines.planning.plan import plan_steps
    from dpkd.pipelines.recipe.format import read_recipe
    from dpkd.pipelines.recipe.run import run

    recipe = tmp_path / "recipe.toml"
    places = json.dumps([str(single("a")), str(single("b"))])
    recipe.write_text(f'[[steps]]\ncommand = "report"\nevaluations = {places}\nout = "{tmp_path / "merged"}"\n')
    (step,) = read_recipe(recipe)
    (planned,) = plan_steps([step], {})
    assert not planned.finished
    assert planned.words == "merges 2 evaluations"
    run(RunOptions(recipe=str(recipe)))
    assert planned.finished
    assert "dpkd report" in capsys.readouterr().err
