"""Caches of conversations: spans, turns that the teacher answers itself, and prompts that only the teacher sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.conversations import conversations, make_models, say, write

from dpkd.core.errors import UserError
from dpkd.core.models import locate_model
from dpkd.teacher_cache.audit.fidelity import measure_fidelity
from dpkd.teacher_cache.audit.verify import row_problems, verify_cache
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.build.estimate import estimate_cost
from dpkd.teacher_cache.options.audit import FidelityConfig
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.codec import MAX_ERROR_NATS
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.rows import CachedRow
from dpkd.teacher_cache.store.schema import ROW_SCHEMA


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_models(tmp_path_factory.mktemp("conversations"))


def build(out: Path, teacher: Path, data: Path, **options: Any) -> TeacherCache:
    defaults: dict[str, Any] = {
        "engine": "transformers", "template": "chat", "max_new_tokens": 60, "top_k": 8, "rows_per_shard": 3,
        "device": "cpu", "max_prompt_tokens": 400,
    }  # fmt: skip
    build_cache(CacheConfig(out=str(out), teacher=str(teacher), data=str(data), **(defaults | options)))
    verify_cache(str(out))
    return TeacherCache.open(out)


def rows_of(cache: TeacherCache, origin: str | None = None) -> dict[str, CachedRow]:
    shards = [cache.read(record) for record in cache.shards(origin)]
    rows = [shard.row(index) for shard in shards for index in range(len(shard))]
    return {row.example_id: row for row in rows}


def check_scores(row: CachedRow, teacher: Path) -> None:
    """Log-probs and entries are those of the full logits at the spans, under the prompt that the teacher got."""
    following = row.sequence_ids()[len(row.prompt_ids) :]
    ids = torch.tensor([*row.asked_ids.tolist(), *following.tolist()])
    with torch.no_grad():
        model = locate_model(str(teacher), "teacher").load("float32").eval()
        logprobs = torch.log_softmax(model(input_ids=ids[None]).logits[0].float(), dim=-1)
    moved = len(row.asked_ids) - len(row.prompt_ids)
    places = [place + moved for place in row.places().tolist()]
    assert [int(ids[place]) for place in places] == row.response_ids.tolist()
    expected = [float(logprobs[place - 1, ids[place]]) for place in places]
    np.testing.assert_allclose(row.response_logprobs, expected, atol=2e-4)
    assert row.distributions is not None
    top = torch.topk(logprobs[[place - 1 for place in places]], 8)
    assert row.distributions.counts_T.tolist() == [8] * len(places)
    np.testing.assert_allclose(row.distributions.logprobs_E.reshape(-1, 8), top.values, atol=MAX_ERROR_NATS + 2e-4)


def fidelity(cache: Path, teacher: Path) -> dict[str, Any]:
    return measure_fidelity(FidelityConfig(cache=str(cache), teacher=str(teacher), engine="transformers"))


def build_round(cache: Path, models: tuple[Path, Path]) -> None:
    options: dict[str, Any] = {"engine": "transformers", "device": "cpu", "top_k": 8}
    teacher, student = map(str, models)
    build_cache(CacheConfig(out=str(cache), teacher=teacher, student=student, round="r0", **options))


def shard_hashes(cache: TeacherCache) -> list[tuple[str, str]]:
    return [(record.path, record.sha256) for record in cache.shards()]


def test_one_turn_gives_the_cache_of_a_text_row(tmp_path: Path, models: tuple[Path, Path]) -> None:
    texts = [{"id": str(i), "instruction": f"Count to {i}.", "output": f"It is {i}."} for i in range(5)]
    chats = [
        {"id": row["id"], "messages": [say("user", row["instruction"]), say("assistant", row["output"])]}
        for row in texts
    ]
    text = build(tmp_path / "text", models[0], write(tmp_path / "text.jsonl", texts), responses="both")
    data = write(tmp_path / "chat.jsonl", chats)
    for turns in ("last", "all"):
        chat = build(tmp_path / turns, models[0], data, responses="both", turns=turns)
        assert shard_hashes(chat) == shard_hashes(text)
        assert chat.manifest.format_version == text.manifest.format_version == 1
        differing = {key for key, value in text.identities.items() if chat.identities[key] != value}
        assert differing == {"data"}
    assert pq.read_schema(tmp_path / "text" / text.shards()[0].path).equals(ROW_SCHEMA)


def test_all_turns_of_a_given_conversation_are_one_row(tmp_path: Path, models: tuple[Path, Path]) -> None:
    data = write(tmp_path / "data.jsonl", conversations())
    cache = build(tmp_path / "cache", models[0], data, responses="reference", turns="all")
    assert cache.manifest.format_version == 2
    assert cache.has_spans
    rows, tokenizer = rows_of(cache), locate_model(str(models[0]), "teacher").tokenizer
    assert set(rows) == {"one", "two", "tools"}
    assert [row["reason"] for row in cache.manifest.skipped] == ["no reference response"]
    learnt = {name: tokenizer.decode(row.response_ids) for name, row in rows.items()}
    assert learnt["one"] == "Rome.<|im_end|>"
    assert learnt["two"] == "Rome.<|im_end|>The Tiber.<|im_end|>"
    assert learnt["tools"].endswith("</tool_call><|im_end|>It is warm.<|im_end|>The Tiber.<|im_end|>")
    between = tokenizer.decode(rows["tools"].between_ids)
    assert "22 degrees" in between
    assert "And its river?" in between
    for row in rows.values():
        check_scores(row, models[0])
    assert cache.manifest.longest == max(row.num_tokens for row in rows.values())


def test_the_teacher_answers_every_turn_under_its_history(tmp_path: Path, models: tuple[Path, Path]) -> None:
    data = write(tmp_path / "data.jsonl", conversations())
    cache = build(tmp_path / "cache", models[0], data, turns="all", temperature=0.0, max_new_tokens=12)
    rows, tokenizer = rows_of(cache), locate_model(str(models[0]), "teacher").tokenizer
    assert sorted(rows) == [
        "one", "open/turn-1", "open/turn-2", "tools/turn-1", "tools/turn-2", "tools/turn-3", "two/turn-1", "two/turn-2",
    ]  # fmt: skip
    assert cache.manifest.format_version == 1  # each row has one span
    given = tokenizer.decode(rows["two/turn-2"].prompt_ids)
    assert given.endswith("Rome.<|im_end|>\n<|im_start|>user\nAnd its river?<|im_end|>\n<|im_start|>assistant\n")
    own = tokenizer.decode(rows["open/turn-1"].response_ids, skip_special_tokens=True)
    asked = tokenizer.decode(rows["open/turn-2"].prompt_ids)
    assert f"assistant\n{own}<|im_end|>\n<|im_start|>user\nAnd its river?" in asked
    for row in rows.values():
        check_scores(row, models[0])
    last = rows_of(build(tmp_path / "last", models[0], data, temperature=0.0, max_new_tokens=12))
    assert set(last) == {"one", "two", "tools", "open"}
    assert last["two"].prompt_ids.tolist() == rows["two/turn-2"].prompt_ids.tolist()


def test_an_interrupted_job_of_turns_goes_on_where_it_was(tmp_path: Path, models: tuple[Path, Path]) -> None:
    data = write(tmp_path / "data.jsonl", conversations())
    options: dict[str, Any] = {"turns": "all", "rows_per_shard": 2, "max_new_tokens": 12}
    whole = build(tmp_path / "whole", models[0], data, **options)

    import dpkd.teacher_cache.store.job as job_module

    committed = job_module.Job.commit
    calls: list[str] = []

    def failing(self: Any, data: bytes, record: Any) -> None:
        if len(calls) == 3:
            raise UserError("the disk is full")
        calls.append(record.path)
        committed(self, data, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_module.Job, "commit", failing)
        with pytest.raises(UserError, match="the disk is full"):
            build(tmp_path / "again", models[0], data, **options)
    again = build(tmp_path / "again", models[0], data, **options)
    expected, actual = rows_of(whole), rows_of(again)
    assert [record.path for record in again.shards()] == [record.path for record in whole.shards()]
    assert expected.keys() == actual.keys()
    for name, row in expected.items():
        assert actual[name].prompt_ids.tolist() == row.prompt_ids.tolist()
        assert actual[name].response_ids.tolist() == row.response_ids.tolist()
        check_scores(actual[name], models[0])


def test_equal_prompts_give_an_equal_cache(tmp_path: Path, models: tuple[Path, Path]) -> None:
    rows = [row for row in conversations() if row["id"] != "tools"]
    same = [row | {"teacher_messages": row["messages"]} for row in rows]
    plain = build(tmp_path / "plain", models[0], write(tmp_path / "a.jsonl", rows), responses="both")
    equal = build(tmp_path / "equal", models[0], write(tmp_path / "b.jsonl", same), responses="both")
    assert shard_hashes(plain) == shard_hashes(equal)
    assert equal.manifest.format_version == 1


@pytest.mark.parametrize("form", ["messages", "text"])
def test_the_teacher_is_asked_with_more_than_the_student(tmp_path: Path, models: tuple[Path, Path], form: str) -> None:
    hint = "The capital is Rome. What is the capital of Italy?"
    if form == "messages":
        row = conversations()[0] | {"teacher_messages": [say("user", hint)]}
    else:
        row = {"id": "one", "instruction": "What is the capital of Italy?", "output": "Rome.", "teacher_prompt": hint}
    rows = [row, {"id": "plain", "prompt": "Hello"}]
    cache = build(tmp_path / "cache", models[0], write(tmp_path / "data.jsonl", rows), responses="both")
    assert cache.manifest.format_version == 2
    tokenizer = locate_model(str(models[0]), "teacher").tokenizer
    for origin in ("teacher", "reference"):
        found = rows_of(cache, origin)
        one = found["one"]
        assert "The capital is Rome." not in tokenizer.decode(one.prompt_ids)
        assert "The capital is Rome." in tokenizer.decode(one.asked_ids)
        check_scores(one, models[0])
        if origin == "teacher":
            assert found["plain"].asked_ids.tolist() == found["plain"].prompt_ids.tolist()
    report = fidelity(tmp_path / "cache", models[0])
    assert report["bound"]["holds"] is not False


def test_a_round_is_scored_under_the_teachers_prompt(tmp_path: Path, models: tuple[Path, Path]) -> None:
    row = conversations()[0] | {"teacher_messages": [say("user", "Say Rome.")]}
    build(tmp_path / "cache", models[0], write(tmp_path / "data.jsonl", [row]))
    build_round(tmp_path / "cache", models)
    verify_cache(str(tmp_path / "cache"))
    cache = TeacherCache.open(tmp_path / "cache")
    drawn = cache.read_round(cache.round("r0"), cache.shards()[0]).row(0)
    assert drawn.prompt_ids.tolist() == rows_of(cache)["one"].prompt_ids.tolist()
    check_scores(drawn, models[0])
    # drawn by the student under its own prompt
    ids = torch.tensor(drawn.sequence_ids().astype(np.int64))
    with torch.no_grad():
        logits = locate_model(str(models[1]), "student").load("float32").eval()(input_ids=ids[None]).logits[0]
    expected = torch.log_softmax(logits.float(), -1)[len(drawn.prompt_ids) - 1 : -1].gather(
        1, torch.tensor(drawn.response_ids.astype(np.int64))[:, None]
    )[:, 0]
    np.testing.assert_allclose(drawn.sampling_logprobs, expected, atol=2e-4)


def test_what_cannot_have_several_spans_says_so(tmp_path: Path, models: tuple[Path, Path]) -> None:
    rows = [*conversations(), conversations()[1] | {"id": "hint", "teacher_messages": [say("user", "Rome.")]}]
    data = write(tmp_path / "data.jsonl", rows)
    cache = build(tmp_path / "cache", models[0], data, responses="reference", turns="all")
    assert any("give --turns last" in row["reason"] for row in cache.manifest.skipped)
    with pytest.raises(UserError, match="a round answers each row's prompt once, and rows of this cache have several"):
        build_round(tmp_path / "cache", models)
    report = fidelity(tmp_path / "cache", models[0])
    assert report["positions"] == cache.manifest.counts["positions"]
    assert report["bound"]["holds"] is not False


def test_damaged_spans_are_found(tmp_path: Path, models: tuple[Path, Path]) -> None:
    data = write(tmp_path / "data.jsonl", conversations()[1:2])
    row = rows_of(build(tmp_path / "cache", models[0], data, responses="reference", turns="all"))["two"]
    assert list(row_problems(row, 600)) == []
    assert row.spans is not None
    overlapping, longer = row.spans.copy(), row.spans.copy()
    overlapping[1, 0] = overlapping[0].sum() - 1
    longer[1, 1] += 1
    assert any("overlap" in problem for problem in row_problems(replace(row, spans=overlapping), 600))
    assert any(
        "do not have the response's tokens" in problem for problem in row_problems(replace(row, spans=longer), 600)
    )


def test_a_conversation_that_is_too_long_keeps_the_turns_that_fit(tmp_path: Path, models: tuple[Path, Path]) -> None:
    data = write(tmp_path / "data.jsonl", conversations())
    whole = rows_of(build(tmp_path / "whole", models[0], data, responses="reference", turns="all"))["two"]
    assert whole.spans is not None
    most = int(whole.spans[1, 0]) - 1
    cache = build(tmp_path / "cache", models[0], data, responses="reference", turns="all", max_prompt_tokens=most)
    assert rows_of(cache)["two"].response_ids.tolist() == whole.by_span()[0].response_ids.tolist()
    assert any(row["reason"].startswith("the last 1 of 2 turns do not fit") for row in cache.manifest.skipped)


def test_the_cost_of_turns_is_that_of_all_their_rows(tmp_path: Path, models: tuple[Path, Path]) -> None:
    data = write(tmp_path / "data.jsonl", conversations())
    config = CacheConfig(
        out=str(tmp_path / "cache"), teacher=str(models[0]), data=str(data), turns="all", engine="transformers",
        template="chat", device="cpu", max_new_tokens=4, max_prompt_tokens=400, dry_run=True, pilot_rows=6,
    )  # fmt: skip
    cost = estimate_cost(config)
    assert cost.num_rows == 8
    assert not (tmp_path / "cache").exists()


def test_an_estimate_counts_the_answers_before_later_questions(tmp_path: Path, models: tuple[Path, Path]) -> None:
    """Of conversations whose questions are open: later prompts hold the teacher's own answers of 60 tokens."""
    ask = [say("user", "What is the capital of Italy?"), say("user", "And its river?"), say("user", "And its sea?")]
    data = write(tmp_path / "data.jsonl", [{"id": str(n), "messages": ask} for n in range(6)])
    options = {"teacher": str(models[0]), "data": str(data), "turns": "all", "engine": "transformers", "device": "cpu"}
    options |= {"template": "chat", "max_new_tokens": 60, "max_prompt_tokens": 400, "out": str(tmp_path / "cache")}
    cost = estimate_cost(CacheConfig(**options, dry_run=True, pilot_rows=12))
    cache = build(tmp_path / "cache", *[models[0], data], turns="all", top_k=64)
    real = sum(len(row.prompt_ids) for row in rows_of(cache).values())
    assert sum(phase.prompt_tokens for phase in cost.phases) == pytest.approx(real, rel=0.1)


def test_a_round_has_the_turns_of_its_cache(tmp_path: Path, models: tuple[Path, Path]) -> None:
    data = write(tmp_path / "data.jsonl", conversations())
    cache = build(tmp_path / "cache", models[0], data, turns="all", max_new_tokens=6)
    build_round(tmp_path / "cache", models)
    assert verify_cache(str(tmp_path / "cache"))["rows"] == 16
    student_round = TeacherCache.open(tmp_path / "cache").round("r0")
    assert 'turns = "all"' in student_round.folder.read("dpkd.toml").decode()
    assert [shard.path for shard in student_round.manifest.shards] == [shard.path for shard in cache.shards()]
    for record in cache.shards():
        ours, theirs = cache.read(record), cache.read_round(student_round, record)
        for index in range(record.rows):
            assert ours.key(index) == theirs.key(index)
            assert ours.row(index).prompt_ids.tolist() == theirs.row(index).prompt_ids.tolist()
            check_scores(theirs.row(index), models[0])
