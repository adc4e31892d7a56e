"""Caches made of what others stored: DistillKit's files, written by its own code, and JSON lines as of OpenAI."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.commands import dpkd
from support.openai_endpoint import ToyEndpoint, check_values, rows_of
from support.toys import ROOT

from dpkd.core.errors import UserError
from dpkd.core.models import locate_model
from dpkd.distill import TrainConfig, train
from dpkd.teacher_cache.audit.verify import verify_cache
from dpkd.teacher_cache.build.importing.importing import import_cache
from dpkd.teacher_cache.options.derive import ImportConfig
from dpkd.teacher_cache.store.reader import TeacherCache

WRITTEN = ROOT / "tests" / "support" / "distillkit"  # write.py says how
FORMS = ("exact", "recommended", "residuals", "normalised", "legacy")
GRID = 1 / 256


def distillkit(form: str, tokenizer: Path, out: Path, **more: Any) -> ImportConfig:
    return ImportConfig(
        source=WRITTEN / form, source_format="distillkit", tokenizer=str(tokenizer), out=str(out), **more
    )


def expected_row(form: str, row: int) -> dict[str, np.ndarray]:
    with np.load(WRITTEN / form / "expected.npz") as arrays:
        return {key: arrays[f"{key}_{row}"] for key in ("ids", "values", "input_ids", "true")}


@pytest.mark.parametrize("form", FORMS)
def test_a_distillkit_dataset_has_the_values_that_distillkit_reads(
    form: str, toy_tokenizer: Path, tmp_path: Path
) -> None:
    manifest = import_cache(distillkit(form, toy_tokenizer, tmp_path / "cache"))
    assert not manifest.failed
    verify_cache(tmp_path / "cache")
    rows = rows_of(tmp_path / "cache")
    assert len(rows) == 3
    for number, row in enumerate(rows):
        expected, top = expected_row(form, number), row.distributions
        assert top is not None
        num = len(expected["input_ids"]) - 1 - (number == 2)  # without the padding after the EOS
        np.testing.assert_array_equal(
            np.concatenate([row.prompt_ids, row.response_ids]), expected["input_ids"][: num + 1]
        )
        assert (row.finish_reason, len(row.response_logprobs)) == ("stop", 0)
        ends = np.cumsum([0, *top.counts_T])
        for position in range(num):
            values = expected["values"][position].astype(np.float64)
            order = np.argsort(-values, kind="stable")
            if form == "legacy":  # logits: only their ratios are known
                values -= np.log(np.exp(values).sum())
            values -= max(np.log(np.exp(values).sum()), 0.0)
            part = slice(ends[position], ends[position + 1])
            np.testing.assert_array_equal(top.ids_E[part], expected["ids"][position][order])
            np.testing.assert_allclose(top.logprobs_E[part], values[order], atol=GRID + 1e-4)
            if form == "exact":
                np.testing.assert_allclose(values, expected["true"][position], atol=1e-6)
                tail = np.log1p(-np.exp(expected["true"][position].astype(np.float64)).sum())
                assert top.log_tail_T[position] == pytest.approx(tail, abs=1e-3)


@pytest.mark.parametrize("form", ["exact", "recommended"])
def test_what_distillkit_does_not_store_is_unknown_and_refused(
    form: str, toy_tokenizer: Path, toy_teacher: Path, toy_student: Path, tmp_path: Path
) -> None:
    manifest = import_cache(distillkit(form, toy_tokenizer, tmp_path / "cache", teacher_name="a teacher"))
    identities = manifest.identities
    assert identities["teacher"]["name"] == "a teacher"
    assert {identities["teacher"][key] for key in ("revision", "dtype")} == {"unknown"}
    assert identities["template"] == {"name": "unknown", "sha256": "unknown"}
    assert identities["logprobs"]["responses"] == "unknown"
    assert identities["logprobs"].get("remainder") == (None if form == "exact" else "unknown")
    common = {
        "cache": str(tmp_path / "cache"), "student": str(toy_student), "steps": 2, "batch_size": 2, "device": "cpu",
        "validation_examples": 0,
    }  # fmt: skip
    if form == "recommended":
        with pytest.raises(UserError, match=r"does not know the tail mass.*Give --tail renormalise"):
            train(TrainConfig(**common, out=str(tmp_path / "refused")))
        argmax = {"token_pairs": "argmax", "kd_weight": 0.1, "tail": "renormalise"}  # where q's arg-max is in the tail
        with pytest.raises(UserError, match=r"likeliest token may be in the tail: found --token-pairs argmax"):
            train(TrainConfig(**common, **argmax, out=str(tmp_path / "refused")))
    known = {} if form == "exact" else {"tail": "renormalise"}
    run = train(TrainConfig(**common, out=str(tmp_path / "run"), objective="forward-kl", **known))
    # widths are chosen, and the student is measured, without log-probs of the responses
    made = dpkd("init-student", "--teacher", toy_teacher, "--cache", tmp_path / "cache", "--out", tmp_path / "made",
                "--params", 0.8, "--cache-rows", 3, "--device", "cpu")  # fmt: skip
    assert made.returncode == 0, made.stderr
    # the student's template is unknown, not `unknown`: eval takes the one that it is given
    assert locate_model(str(run), "student").trained_template() is None
    with pytest.raises(UserError, match=r"how likely whole responses are, which --level sequence needs"):
        train(TrainConfig(**common, out=str(tmp_path / "s"), level="sequence", student_samples="live",
                          teacher_url="http://127.0.0.1:1"))  # fmt: skip


def test_a_wrong_compression_config_is_found(toy_tokenizer: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(WRITTEN / "recommended", tmp_path / "source"))
    config = distillkit("recommended", toy_tokenizer, tmp_path / "cache").model_copy(update={"source": source})
    right = yaml.safe_load((source / "compression_config.yaml").read_text())
    (source / "compression_config.yaml").write_text(yaml.safe_dump(right | {"exact_k": 5}))
    with pytest.raises(UserError, match=r"is not that of the files: found 26 bytes per position, expected 24"):
        import_cache(config)
    (source / "compression_config.yaml").write_text(yaml.safe_dump(right | {"k": "many"}))
    with pytest.raises(UserError, match=r"the compression config cannot be used"):
        import_cache(config)
    (source / "compression_config.yaml").unlink()
    with pytest.raises(UserError, match=r"the compression config is missing.*Give --compression FILE"):
        import_cache(config)
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(right))
    given = {"out": str(tmp_path / "again"), "compression": tmp_path / "other.yaml", "limit": 2}
    manifest = import_cache(config.model_copy(update=given))
    assert (manifest.counts["rows"], manifest.failed) == (2, [])


@pytest.fixture(scope="module")
def toy(toy_teacher: Path) -> ToyEndpoint:
    return ToyEndpoint(toy_teacher, most=20)


@pytest.fixture(scope="module")
def answered(toy: ToyEndpoint, toy_data: Path) -> Callable[[str], list[dict[str, Any]]]:
    """Rows as someone would log them: the prompt, and the choice of the endpoint's answer."""

    def rows(api: str) -> list[dict[str, Any]]:
        found = []
        for number, line in enumerate(toy_data.read_text(encoding="utf-8").splitlines()[:6]):
            turns = [{"role": "user", "content": json.loads(line)["instruction"]}]
            text = toy.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            ids = toy.tokenizer.encode(text, add_special_tokens=False)
            body = {"max_tokens": 10, "seed": number}
            body |= {"messages": turns, "top_logprobs": 6} if api == "chat" else {"prompt": ids, "logprobs": 6}
            status, _, content = toy.answer(body)
            assert status == 200
            choice = json.loads(content)["choices"][0]
            response = choice["message"]["content"] if api == "chat" else choice["text"]
            kept = {"response": response, "logprobs": choice["logprobs"], "finish_reason": choice["finish_reason"]}
            found.append({"id": f"r{number}", "messages": turns} | kept)
        return found

    return rows


def jsonl(source: Path, tokenizer: Path, out: Path, **more: Any) -> ImportConfig:
    return ImportConfig(
        source=source, source_format="jsonl", tokenizer=str(tokenizer), out=str(out), template="chat", **more
    )


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_json_lines_have_the_models_values(
    api: str, toy: ToyEndpoint, answered: Any, toy_tokenizer: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    config = jsonl(write_rows(answered(api)), toy_tokenizer, tmp_path / "cache", rows_per_shard=4)
    manifest = import_cache(config)
    assert not manifest.failed
    verify_cache(tmp_path / "cache")
    rows = rows_of(tmp_path / "cache")
    assert [row.example_id for row in rows] == [f"r{number}" for number in range(6)]
    check_values(toy, rows, 6, chat=api == "chat")
    assert manifest.identities["logprobs"]["top_k"] == 6
    assert manifest.identities["generation"]["temperature"] == "unknown"
    # a finished import is left as it is, and one of another file is refused
    assert import_cache(config).fingerprint == manifest.fingerprint
    with pytest.raises(UserError, match=r"a finished cache with other options; differing: data"):
        import_cache(jsonl(write_rows(answered(api)[:5], "other.jsonl"), toy_tokenizer, tmp_path / "cache"))


def test_flat_keys_and_own_log_probs_alone(
    toy: ToyEndpoint, answered: Any, toy_tokenizer: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    flat = [
        {key: value for key, value in row.items() if key != "logprobs"}
        | {key: row["logprobs"][key] for key in ("tokens", "token_logprobs")}
        for row in answered("completions")
    ]
    manifest = import_cache(jsonl(write_rows(flat), toy_tokenizer, tmp_path / "cache"))
    assert not manifest.failed
    verify_cache(tmp_path / "cache")
    for row in rows_of(tmp_path / "cache"):
        assert row.distributions is None
        full_TV = toy.logprobs(row.prompt_ids.tolist(), row.response_ids.tolist()).numpy()
        own_T = full_TV[np.arange(len(full_TV)), row.response_ids]
        known = len(own_T) - (row.finish_reason == "stop")
        np.testing.assert_allclose(row.response_logprobs[:known], own_T[:known], atol=2e-4)


@pytest.mark.parametrize("name", ["stop", "eos_token", "end_turn"])
def test_an_end_without_a_log_prob_is_unknown_whatever_it_is_called(
    name: str, answered: Any, toy_tokenizer: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [row | {"finish_reason": name} for row in answered("completions")]  # no EOS among their tokens
    manifest = import_cache(jsonl(write_rows(rows), toy_tokenizer, tmp_path / "cache"))
    assert (manifest.failed, {row.finish_reason for row in rows_of(tmp_path / "cache")}) == ([], {"stop"})
    assert manifest.identities["logprobs"].get("end") == "unknown"


def test_texts_alone_train_seqkd(
    toy_tokenizer: Path, toy_student: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"prompt": f"Question {number}?", "response": f"The answer is {number}."} for number in range(6)]
    result = dpkd("cache", "import", write_rows(rows), "--from", "jsonl", "--out", tmp_path / "cache", "--tokenizer",
                  toy_tokenizer)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(tmp_path / "cache")
    cache = TeacherCache.open(tmp_path / "cache")
    assert cache.identities["logprobs"]["mode"] == "none"
    tokenizer = locate_model(str(toy_student), "student").tokenizer
    for row, given in zip(rows_of(tmp_path / "cache"), rows, strict=True):
        assert tokenizer.decode(row.response_ids) == given["response"] + "<|end|>"
        assert tokenizer.decode(row.prompt_ids) == given["prompt"]
    verify_cache(tmp_path / "cache")
    common = {"cache": str(tmp_path / "cache"), "student": str(toy_student), "steps": 1, "batch_size": 2}
    train(TrainConfig(**common, device="cpu", out=str(tmp_path / "run"), objective="seqkd"))
    with pytest.raises(UserError, match="has no distributions"):
        train(TrainConfig(**common, device="cpu", out=str(tmp_path / "no")))


def test_rows_that_cannot_be_used_are_listed_and_the_others_imported(
    answered: Any, toy_tokenizer: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = answered("completions")
    rows[0]["response"] += "!"
    rows[1]["logprobs"]["tokens"][0] = "no such token"
    rows[2]["logprobs"]["token_logprobs"].pop()
    rows[3]["logprobs"] = None
    rows[4]["messages"] = [{"role": "assistant", "content": "a"}]
    result = dpkd(
        "cache", "import", write_rows(rows), "--from", "jsonl", "--out", tmp_path / "cache", "--tokenizer",
        toy_tokenizer, "--template", "chat",
    )  # fmt: skip
    assert result.returncode == 3, result.stderr
    failed = {row["example_id"]: row["reason"] for row in TeacherCache.open(tmp_path / "cache").manifest.failed}
    assert failed["r0"] == "the tokens do not give the answer's text back"
    assert failed["r1"] == "'no such token' is not one token of the tokenizer"
    assert failed["r2"].startswith("the log-probs are malformed: ValueError")
    assert failed["r3"] == "the answer has no log-probs"
    assert len(failed) == 5
    assert [row.example_id for row in rows_of(tmp_path / "cache")] == ["r5"]


def test_what_is_no_source_is_one_line(toy_tokenizer: Path, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "cache"
    with pytest.raises(UserError, match=r"line 1 has no `response`: found keys prompt"):
        import_cache(jsonl(write_rows([{"prompt": "a"}]), toy_tokenizer, out))
    with pytest.raises(UserError, match=r"the source has no Parquet files"):
        import_cache(distillkit("nothing", toy_tokenizer, out))
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "texts.parquet")
    config = distillkit("exact", toy_tokenizer, out).model_copy(update={"source": tmp_path / "texts.parquet"})
    with pytest.raises(UserError, match=r"the files are not DistillKit's: found columns text"):
        import_cache(config)
    assert not out.exists()
