"""Perplexity of gold responses and divergence from a cache's teacher in `dpkd eval`, against transformers itself."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from dpkd.core.errors import UserError
from dpkd.distill.student.measures import measure_model
from dpkd.evaluate.evaluation import evaluate
from dpkd.evaluate.options.eval import EvalConfig

MakeConfig = Callable[..., EvalConfig]
WriteRows = Callable[[list[dict[str, Any]], str], Path]

REFERENCE_KEYS = ("perplexity", "reference_nll", "bits_per_byte", "num_references")


@pytest.fixture(scope="module")
def toy_gpt2(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Path) -> Path:
    """Learned positions, 64 of them."""
    directory = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    AutoModelForCausalLM.from_config(GPT2Config(vocab_size=640, eos_token_id=0, **sizes)).save_pretrained(directory)
    for file in toy_tokenizer.glob("*"):
        shutil.copyfile(file, directory / file.name)
    return directory


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Four rows; two gold responses of fewer than four words, one that is too long for 64 positions, two references."""
    outputs = ["A word.", ["This one is the gold response of two.", "Not this"], "Ça va? 本当", "many words " * 40]
    return [{"id": f"row-{i}", "instruction": f"Say {i}", "output": output} for i, output in enumerate(outputs)]


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    def make(**options: Any) -> EvalConfig:
        short = {"out": tmp_path / "out", "engine": "transformers", "template": "raw", "seeds": "10",
                 "max_new_tokens": 4, "max_prompt_tokens": 40, "device": "cpu", "num_sign_flips": 100,
                 "buckets": "4"}  # fmt: skip
        return EvalConfig.parse(short | options, where="a test")

    return make


def run(config: EvalConfig) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(evaluate(config).read_text())
    return report


@torch.no_grad()
def plain_nll(model_dir: Path, prompt: str, response: str) -> tuple[float, int]:
    """transformers' own loss with labels, in nats a token, and how many tokens it is of."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(prompt + response)
    assert ids[: len(prompt_ids)] == prompt_ids
    labels = [*([-100] * len(prompt_ids)), *ids[len(prompt_ids) :], tokenizer.eos_token_id]
    loss = model(input_ids=torch.tensor([[*ids, tokenizer.eos_token_id]]), labels=torch.tensor([labels])).loss
    return float(loss), len(labels) - len(prompt_ids)


def test_perplexity_is_transformers_own_loss(
    make_config: MakeConfig, write_rows: WriteRows, rows: list[dict[str, Any]], toy_gpt2: Path, toy_student: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = write_rows([{"prediction": "word"}] * 4, "p.jsonl")
    config = make_config(
        model=[f"gpt2={toy_gpt2}", f"llama={toy_student}"], predictions=f"p={given}",
        data=f"d={write_rows(rows, 'd.jsonl')}",
    )  # fmt: skip
    report = run(config)
    said = capsys.readouterr().err
    assert "data d: 1 gold responses are longer than the positions of a model" in said
    assert "model gpt2, perplexity: 3/3 gold responses" in said
    assert said.count("starting transformers") == 2  # one engine per model answers and scores
    table = pq.read_table(config.out / "per_example.parquet").to_pandas()
    for name, directory in (("gpt2", toy_gpt2), ("llama", toy_student)):
        texts = ["A word.", "This one is the gold response of two.", "Ça va? 本当"]
        plain = [plain_nll(directory, f"Say {i}", text) for i, text in enumerate(texts)]
        mine = table[table.model == name]
        assert list(mine.reference_nll[:3]) == pytest.approx([nll for nll, _ in plain], rel=1e-5)
        assert list(mine.reference_tokens[:3]) == [num_tokens for _, num_tokens in plain]
        assert math.isnan(mine.reference_nll.iloc[3])
        summary = report["models"][name]["data"]["d"]
        for found, places in ((summary, (0, 1, 2)), (summary["buckets"][0], (0, 2)), (summary["buckets"][1], (1,))):
            nats = sum(plain[place][0] * plain[place][1] for place in places)
            num_tokens = sum(plain[place][1] for place in places)
            num_bytes = sum(len(texts[place].encode()) for place in places)
            assert found["num_references"] == len(places)
            assert found["reference_nll"]["mean"] == pytest.approx(nats / num_tokens, rel=1e-5)
            assert found["perplexity"]["mean"] == pytest.approx(math.exp(nats / num_tokens), rel=1e-4)
            assert found["bits_per_byte"]["mean"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
            interval = found["reference_nll"]
            if len(places) == 1:  # one row has no interval
                assert interval["low"] is interval["high"] is found["perplexity"]["high"] is None
                continue
            assert 0 <= interval["low"] <= interval["mean"] <= interval["high"]
            assert found["perplexity"]["high"] == pytest.approx(math.exp(interval["high"]))
            if len(places) == 2:  # of two rows the errors are equal, and Student's t is 12.706
                nll, num_rows_tokens = plain[places[0]]
                error = abs(nll - interval["mean"]) * num_rows_tokens / (num_tokens / 2)
                assert interval["high"] == pytest.approx(interval["mean"] + 12.7062 * error, rel=1e-4)
    assert [report["models"]["p"]["data"]["d"][key] for key in REFERENCE_KEYS] == [None] * 4
    assert table[table.model == "p"].reference_nll.isna().all()
    for file in ("report.md", "report.html"):
        assert "If tokenizers differ, compare bits per byte" in (config.out / file).read_text()


def test_what_was_measured_is_kept(
    make_config: MakeConfig, write_rows: WriteRows, toy_student: Path, toy_cache: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows = [{"id": f"row-{i}", "instruction": f"Say {i}", "output": "word " * (i + 1)} for i in range(20)]
    options = {
        "model": f"m={toy_student}", "data": f"d={write_rows(rows, 'd.jsonl')}", "cache": toy_cache,
        "cache_rows": 9, "temperature": 0, "template": "chat",
    }  # fmt: skip
    config = make_config(**options)
    run(config)
    whole = (config.out / "report.json").read_bytes()
    said = capsys.readouterr().err
    assert "20/20 gold responses" in said
    assert "rows of the cache: 9/9 rows" in said
    # killed in the middle of a batch, not the first; and a file that cannot be read
    (kept,) = (config.out / "generations" / "m" / "d").glob("references-*.jsonl")
    lines = kept.read_bytes().splitlines(keepends=True)
    assert len(lines) > 2
    kept.write_bytes(b"".join(lines)[:-9])
    (teacher,) = (config.out / "generations" / "m").glob("_teacher-*.json")
    written = teacher.read_bytes()
    teacher.write_bytes(b"{}")
    (config.out / "report.json").unlink()
    run(config)
    said = capsys.readouterr().err
    assert "20/20 gold responses" in said
    assert f"{teacher} cannot be read (KeyError); it is measured again" in said
    assert teacher.read_bytes() == written
    assert kept.read_bytes() == b"".join(lines)
    assert (config.out / "report.json").read_bytes() == whole
    # another evaluation, with other buckets, measures nothing
    again = run(make_config(**options, buckets="7", out=tmp_path / "again", generations=config.out / "generations"))
    said = capsys.readouterr().err
    assert "gold responses" not in said
    assert "rows of the cache" not in said
    assert again["models"]["m"]["to_teacher"] == json.loads(whole)["models"]["m"]["to_teacher"]


def test_divergence_from_the_teacher_of_the_cache(
    make_config: MakeConfig, write_rows: WriteRows, rows: list[dict[str, Any]], toy_cache: Path, toy_teacher: Path,
    toy_student: Path, other_student: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    models = {"teacher": toy_teacher, "student": toy_student, "other": other_student}
    config = make_config(
        model=[f"{name}={place}" for name, place in models.items()], data=f"d={write_rows(rows[:2], 'd.jsonl')}",
        cache=toy_cache, template="chat", perplexity=False,
    )  # fmt: skip
    report = run(config)
    assert "model other: no divergence from the cache's teacher: the model's tokenizer is not the cache's" in (
        capsys.readouterr().err
    )
    found = {name: report["models"][name]["to_teacher"] for name in models}
    assert found["other"] is None
    assert found["teacher"]["kl"]["mean"] == pytest.approx(0, abs=1e-4)
    expected = measure_model(str(toy_student), toy_cache, num_rows=256, device="cpu")
    assert (found["student"]["num_rows"], found["student"]["num_tokens"]) == (expected["rows"], expected["tokens"])
    for key in ("kl", "rkld", "kld_first", "rkld_first", "top1_agreement", "perplexity"):
        interval = found["student"][key]
        assert interval["mean"] == pytest.approx(expected[key], rel=1e-6), key
        assert interval["low"] < interval["mean"] < interval["high"], key
    for file in ("report.md", "report.html"):
        assert "Divergence from the teacher of the cache" in (config.out / file).read_text()
    assert report["models"]["student"]["data"]["d"]["perplexity"] is None  # not asked for


def test_weights_that_give_no_finite_numbers_are_an_error(
    make_config: MakeConfig, write_rows: WriteRows, rows: list[dict[str, Any]], toy_student: Path, toy_cache: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(toy_student)
    broken = Path(shutil.copytree(toy_student, tmp_path / "broken"))
    with torch.no_grad():
        model.model.norm.weight[:] = math.inf
    model.save_pretrained(broken)
    options = {"model": f"m={broken}", "data": f"d={write_rows(rows[:1], 'd.jsonl')}", "temperature": 0}
    with pytest.raises(UserError, match=r"log-probs are not finite .*broken.*--no-perplexity"):
        evaluate(make_config(**options))
    config = make_config(**options, perplexity=False, cache=toy_cache, template="chat", out=tmp_path / "second")
    with pytest.raises(UserError, match=r"logits are not numbers.*give --cache-rows 0"):
        evaluate(config)
