"""Given predictions: matched by order or by id, refused if they do not match, scored like generated answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.commands import dpkd

from dpkd.core.errors import UserError
from dpkd.evaluate.evaluation import evaluate
from dpkd.evaluate.options.eval import EvalConfig

MakeConfig = Callable[..., EvalConfig]
WriteRows = Callable[[list[Any], str], Path]


def _responses(config: EvalConfig) -> list[tuple[str, str, int]]:
    rows = pq.read_table(config.out / "per_example.parquet").to_pylist()
    return [(row["example_id"], row["response"], row["seed"]) for row in rows]


@pytest.fixture
def data(write_rows: WriteRows) -> Path:
    """Rows a, b, c of which b has no reference."""
    rows = [{"id": name, "instruction": f"Say {name}", "output": name} for name in "abc"]
    rows[1]["output"] = ""
    return write_rows(rows, "d.jsonl")


def test_by_row_order_with_a_line_for_rows_that_are_left_out(
    data: Path, make_config: MakeConfig, write_rows: WriteRows
) -> None:
    lines = write_rows([{"prediction": text} for text in ("a", "x", "no")], "p.jsonl")
    config = make_config(predictions=f"p={lines}", data=f"d={data}")
    report = json.loads(evaluate(config).read_text())
    assert _responses(config) == [("a", "a", 0), ("c", "no", 0)]
    summary = report["models"]["p"]["data"]["d"]
    assert summary["exact_match"]["mean"] == 50.0
    assert summary["mean_response_tokens"] is None
    assert summary["share_unfinished"] is None
    assert report["data"]["d"]["num_without_reference"] == 1
    markdown = (config.out / "report.md").read_text()
    assert "## d (2 rows, 1 left out, 1 of them without a reference)" in markdown
    assert "Template" not in markdown
    assert "to a model with unrelated scores" in markdown
    assert not (config.out / "generations").exists()


def test_by_row_order_without_the_rows_that_are_left_out(
    data: Path, make_config: MakeConfig, write_rows: WriteRows, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = write_rows([{"prediction": text} for text in ("a", "no")], "p.jsonl")
    config = make_config(predictions=f"p={lines}", data=f"d={data}")
    evaluate(config)
    assert _responses(config) == [("a", "a", 0), ("c", "no", 0)]
    assert "one prediction for each of the 2 evaluated rows" in capsys.readouterr().err


def test_half_a_surrogate_pair_is_refused_before_anything_is_scored(data: Path, make_config: MakeConfig) -> None:
    path = data.with_name("p.jsonl")
    path.write_text('{"prediction": "fine"}\n{"prediction": "half \\ud83d"}\n{"prediction": "fine"}\n')
    config = make_config(predictions=f"p={path}", data=f"d={data}")
    with pytest.raises(UserError, match="line 2 has a `prediction` with half a surrogate pair"):
        evaluate(config)
    assert not config.out.exists()


def test_predictions_alone_report_no_seeds_that_nobody_gave(
    data: Path, make_config: MakeConfig, write_rows: WriteRows
) -> None:
    lines = write_rows([{"prediction": text} for text in "abc"], "p.jsonl")
    config = make_config(predictions=f"p={lines}", data=f"d={data}", seeds="none")
    report = json.loads(evaluate(config).read_text())
    assert report["settings"]["seeds"] is None
    assert "seed" not in report["command"]
    assert "seed" not in (config.out / "dpkd.toml").read_text().replace("sign_flip_seed", "")
    assert "Answers of p: `given as text`" in (config.out / "report.md").read_text()


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\u000b"])
def test_fields_with_separators_of_lines_are_renamed(data: Path, make_config: MakeConfig, separator: str) -> None:
    rows = [{"question": f"Say{separator}{name}", "output": f"{name}{separator}!"} for name in "abc"]
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    given = data.with_name("p.jsonl")
    lines = [{"prediction": f"{name}{separator}!"} for name in "abc"]
    given.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    config = make_config(predictions=f"p={given}", data=f"d={data}", field="instruction=question")
    report = json.loads(evaluate(config).read_text())
    assert report["models"]["p"]["data"]["d"]["exact_match"]["mean"] == 100.0


def test_by_example_id_and_seed(
    data: Path, make_config: MakeConfig, write_rows: WriteRows, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"example_id": name, "prediction": f"{name} {seed}", "seed": seed} for seed in (7, 3) for name in "cab"]
    config = make_config(predictions=f"p={write_rows(lines, 'p.jsonl')}", data=f"d={data}")
    evaluate(config)
    assert _responses(config) == [("a", "a 3", 3), ("c", "c 3", 3), ("a", "a 7", 7), ("c", "c 7", 7)]
    assert "1 predictions are for rows that are not evaluated" in capsys.readouterr().err


def test_predictions_with_a_model_and_for_several_sets(
    data: Path, make_config: MakeConfig, write_rows: WriteRows, rows: list[Any], toy_student: Path
) -> None:
    first = write_rows([{"prediction": text} for text in "abc"], "p.jsonl")
    second = write_rows([{"prediction": row["output"]} for row in rows], "q.jsonl")
    config = make_config(
        model=f"student={toy_student}",
        predictions=[f"gold:d={first}", f"gold:e={second}"],
        data=[f"d={data}", f"e={write_rows(rows, 'e.jsonl')}"],
        seeds="10",
    )
    path = evaluate(config)
    report = json.loads(path.read_text())
    assert list(report["models"]) == ["student", "gold"]
    assert report["models"]["gold"]["data"]["e"]["exact_match"]["mean"] == 100.0
    (comparison,) = report["comparisons"]["e"]
    assert (comparison["model"], comparison["baseline"]) == ("gold", "student")
    assert comparison["rouge_l"]["wins"] == 6
    assert comparison["rouge_l"]["p_value"] < 0.05
    assert len(comparison["buckets"]) == 3
    assert evaluate(config) == path  # complete already
    first.write_text(first.read_text().replace("a", "z"))
    with pytest.raises(UserError, match=r"holds another report; differing: predictions\.gold\.d: "):
        evaluate(config)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"prediction": "a"}] * 4, r"a line for each row of data d: found 4 of seed 0, expected 3 \(2 without those"),
        ([{"prediction": "a"}], r"found 1 of seed 0, expected 3 .*p\.jsonl.*or give each line its `example_id`"),
        ([{"text": "a"}], r"line 1 has no text `prediction`: found keys text .*p\.jsonl.*Write \{\"prediction\""),
        (["a"], r"line 1 has no text `prediction`: found str"),
        ([{"prediction": 5}], r"line 1 has no text `prediction`"),
        ([{"prediction": "a", "seed": True}], r"line 1 has a `seed` that is not an integer from 0: found True"),
        ([{"prediction": "a", "seed": "x"}], r"line 1 has a `seed` that is not an integer from 0: found 'x'"),
        ([], r"the file of predictions is empty"),
        ([{"prediction": "a", "example_id": "a"}, {"prediction": "b"}], r"some lines have an `example_id`.*1 of 2"),
        ([{"prediction": "a", "example_id": "a"}] * 2, r"two lines of seed 0 have the example_id 'a'"),
        (
            [{"prediction": "a", "example_id": "a"}],
            r"1 rows of data d have no prediction of seed 0: found none for .*'c'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    data: Path, make_config: MakeConfig, write_rows: WriteRows, lines: list[Any], message: str
) -> None:
    config = make_config(predictions=f"p={write_rows(lines, 'p.jsonl')}", data=f"d={data}")
    with pytest.raises(UserError, match=message):
        evaluate(config)
    assert not config.out.exists()


def test_files_that_are_missing_or_no_json(data: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(predictions=f"p={tmp_path / 'p.jsonl'}", data=f"d={data}")
    with pytest.raises(UserError, match=r"the file is missing"):
        evaluate(config)
    (tmp_path / "p.jsonl").write_text('{"prediction": "a"}\n{oops\n')
    with pytest.raises(UserError, match=r"line 2 is not JSON"):
        evaluate(config)


def test_each_set_needs_its_predictions(data: Path, make_config: MakeConfig, write_rows: WriteRows) -> None:
    lines = write_rows([{"prediction": "a"}] * 3, "p.jsonl")
    sets = [f"d={data}", f"e={data}"]
    with pytest.raises(
        UserError, match=r"unclear which set the predictions 'p' answer: found 2 sets.*--predictions p:d"
    ):
        evaluate(make_config(predictions=f"p={lines}", data=sets))
    with pytest.raises(
        UserError, match=r"two files of predictions answer one set .*: found p, p:d .*each NAME:SET one"
    ):
        evaluate(make_config(predictions=[f"p={lines}", f"p:d={lines}"], data=f"d={data}"))
    with pytest.raises(UserError, match=r"do not answer each set once: found d, expected d, e .*difference is e"):
        evaluate(make_config(predictions=f"p:d={lines}", data=sets))


def test_what_needs_a_model_says_so(data: Path, make_config: MakeConfig, write_rows: WriteRows, tmp_path: Path) -> None:
    options = {"predictions": f"p={write_rows([{'prediction': 'a'}] * 3, 'p.jsonl')}", "data": f"d={data}"}
    with pytest.raises(UserError, match=r"buckets by tokens need a model's tokenizer"):
        evaluate(make_config(**options, bucket_by="tokens"))
    with pytest.raises(UserError, match=r"no --model .*--cache.*--train-data"):
        evaluate(make_config(**options, cache=tmp_path))
    with pytest.raises(UserError, match=r"`model` .or `predictions`. is required"):
        make_config(data=f"d={data}")
    with pytest.raises(UserError, match=r"the name 'p' is also the name of a model"):
        make_config(**options, model="p=dir")


def test_the_answers_own_tokens_need_a_model(
    data: Path, make_config: MakeConfig, write_rows: WriteRows, toy_student: Path
) -> None:
    config = make_config(
        model=f"m={toy_student}",
        predictions=f"p={write_rows([{'prediction': 'a'}] * 3, 'p.jsonl')}",
        data=f"d={data}",
        seeds="10",
        bucket_by="tokens",
        bucket_of="prediction",
    )
    with pytest.raises(UserError, match=r"buckets by the answers' tokens need answers with known tokens"):
        evaluate(config)
    assert not (config.out / "generations").exists()  # refused before the model answered anything


def test_the_command_prints_the_tables(
    data: Path, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write_rows([{"prediction": text} for text in ("a", "x", "no")], "p.jsonl")
    command = ["eval", "--out", str(tmp_path / "out"), "--predictions", f"p={lines}", "--predictions", f"q={lines}"]
    done = dpkd(*command, "--data", f"d={data}")
    assert done.returncode == 0, done.stderr
    assert "| `p` | 50.00 [0.00, 100.00] |" in done.stdout
    assert "| `q` - `p` | +0.00 [+0.00, +0.00] | 1.000 | 1.000 | 0 / 2 / 0 | 0.00 |" in done.stdout
    assert "Resolvable: with 2 rows" in done.stdout
    assert done.stdout.rstrip().endswith(f"report: {tmp_path / 'out' / 'report.json'}")
    monkeypatch.setenv("DPKD_DATA", "")
    again = dpkd(*command, "--data", "dolly")
    assert again.returncode == 2
    assert again.stderr.startswith("error: there is no data directory for the set 'dolly'")
