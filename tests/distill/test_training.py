"""Training runs on the toy cache: outputs, errors, and resuming."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpkd.core.errors import UserError
from dpkd.distill.objectives.objective import METRICS, Objective
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.training import train
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.reader import TeacherCache


def config(out: Path, cache: Path, student: Path, **options: object) -> TrainConfig:
    defaults: dict[str, Any] = {"steps": 4, "batch_size": 5, "learning_rate": 1e-3, "device": "cpu"}
    defaults["validation_examples"] = 0  # all rows, and the last student
    return TrainConfig(out=out, cache=cache, student=str(student), **(defaults | options))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if not key.endswith(("_s", "_bytes"))} for line in lines]


def test_token_level_run_writes_what_it_promises(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    out = train(config(tmp_path / "run", toy_cache, toy_student, sft_weight=0.5, token_pairs="argmax"))
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    expected = {"step", "epoch", "loss", "loss_dpkd", "loss_sft", "learning_rate", "grad_norm", *METRICS}
    assert set(lines[0]) == expected | {"tokens", "tokens_per_s", "step_time_s", "data_wait_s", "peak_memory_bytes"}
    for line in lines:
        assert math.isclose(line["loss"], line["loss_dpkd"] + 0.5 * line["loss_sft"], rel_tol=1e-5)
        assert line["loss_dpkd"] >= math.log(2) - 1e-6  # arg-max against arg-max
        assert 0 <= line["teacher_miss_rate"] <= 1
        assert math.isclose(line["reward_margin"], line["reward_chosen"] - line["reward_rejected"], abs_tol=1e-6)
    student = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(student.generate(**tokenizer("a", return_tensors="pt"), max_new_tokens=2)[0])
    assert json.loads((out / "dpkd.json").read_text())["template"]["name"] == "chat"
    assert "sft_weight = 0.5" in (out / "dpkd.toml").read_text()
    assert not list(out.rglob("*.bin"))
    assert not list(out.rglob("*.pt"))


@pytest.mark.parametrize(
    "options",
    [
        {"level": "token"},
        {"level": "token", "token_pairs": "drawn"},
        {"level": "sequence", "round": "r0", "beta": 1.0},
        {"level": "sequence", "round": "r0", "beta": 1.0, "length_normalize": False},
        {"objective": "sft"},
        {"objective": "sft", "responses": "teacher"},
    ],
    ids=str,
)
def test_every_objective_lowers_its_loss(
    tmp_path: Path, toy_cache: Path, toy_student: Path, options: dict[str, Any]
) -> None:
    lines = metrics(train(config(tmp_path / "run", toy_cache, toy_student, steps=24, batch_size=10, **options)))
    first, last = (sum(line["loss"] for line in part) / 6 for part in (lines[:6], lines[-6:]))
    assert last < first - 0.01
    if options.get("objective") == "sft":
        assert lines[0]["reward_margin"] is None
        assert lines[0]["reward_chosen"] is not None
    else:
        assert lines[-1]["reward_margin"] > lines[0]["reward_margin"]


def test_sequence_loss_of_the_teacher_itself_is_log_two(tmp_path: Path, toy_cache: Path, toy_teacher: Path) -> None:
    """Cached equals live: with the teacher as the student, every ratio is 1 up to the float32 of the cache."""
    lines = metrics(
        train(config(tmp_path / "run", toy_cache, toy_teacher, steps=1, level="sequence", round="r0", beta=1.0))
    )
    assert math.isclose(lines[0]["loss"], math.log(2), abs_tol=1e-4)
    assert abs(lines[0]["reward_chosen"]) < 1e-4
    assert abs(lines[0]["reward_rejected"]) < 1e-4


def test_token_loss_of_the_teacher_itself_is_log_two(tmp_path: Path, toy_cache: Path, toy_teacher: Path) -> None:
    for pairs in ("all", "drawn", "argmax"):
        out = train(config(tmp_path / pairs, toy_cache, toy_teacher, steps=1, token_pairs=pairs))
        line = metrics(out)[0]
        assert math.isclose(line["loss"], math.log(2), abs_tol=1e-3)
    assert line["teacher_miss_rate"] == 0
    # nothing between a model and itself but the cache's grid
    for name in ("kld", "rkld", "kld_first", "rkld_first"):
        assert 0 <= line[name] < 1e-4, name
    assert line["top1_agreement"] > 0.999
    assert line["zero_gradient_share"] > 0.999


def test_what_is_measured_is_what_full_logits_say(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    """One step over the whole cache, against plain torch on the student's full distribution and the cached one."""
    cache = TeacherCache.open(toy_cache)
    rows = [shard.row(index) for _, shard in cache.scan(cache.shards()) for index in range(len(shard))]
    line = metrics(train(config(tmp_path / "run", toy_cache, toy_student, steps=1, batch_size=len(rows))))[0]
    model = AutoModelForCausalLM.from_pretrained(toy_student)
    sums = {"entropy": 0.0, "kld": 0.0, "rkld": 0.0, "kld_first": 0.0, "top1_agreement": 0.0}
    positions = 0
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(row.prompt_ids) - 1 : -1].double()
        start = 0
        for position, count in enumerate(row.distributions.counts_T):
            kept = torch.tensor(row.distributions.ids_E[start : start + count]).long()
            p = torch.tensor(row.distributions.logprobs_E[start : start + count]).double().exp()
            start += count
            q_all = torch.softmax(logits[position], dim=0)
            p = torch.cat([p, torch.tensor([float(row.distributions.log_tail_T[position])]).double().exp()])
            q = torch.cat([q_all[kept], (1 - q_all[kept].sum())[None]])
            kld, rkld = float((p * (p / q).log()).sum()), float((q * (q / p).log()).sum())
            sums["kld"] += kld
            sums["rkld"] += rkld
            sums["kld_first"] += kld if position == 0 else 0
            sums["entropy"] += float(-(q_all * q_all.log()).sum())
            sums["top1_agreement"] += int(q_all.argmax()) == int(kept[0])
            positions += 1
    for name, value in sums.items():
        mean = value / (len(rows) if name == "kld_first" else positions)
        assert math.isclose(line[name], mean, rel_tol=2e-3, abs_tol=1e-4), name
    assert line["chosen_length"] == positions / len(rows)
    assert math.isclose(line["unfinished_chosen"], sum(row.finish_reason == "length" for row in rows) / len(rows))


def test_accumulation_changes_nothing_but_the_memory(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    """Positions are weighted alike whether a step's rows come in one forward pass or in four of unequal lengths."""
    argmax = {"token_pairs": "argmax"}
    whole = train(config(tmp_path / "a", toy_cache, toy_student, batch_size=8, sft_weight=1.0, **argmax))
    parts = train(
        config(
            tmp_path / "b",
            toy_cache,
            toy_student,
            batch_size=2,
            gradient_accumulation_steps=4,
            sft_weight=1.0,
            **argmax,
        )
    )
    for one, two in zip(metrics(whole), metrics(parts), strict=True):
        assert one["tokens"] == two["tokens"]
        for key in ("loss", "loss_dpkd", "loss_sft", "grad_norm", "reward_margin", "teacher_miss_rate"):
            assert math.isclose(one[key], two[key], rel_tol=1e-4), key


def test_the_environment_does_not_set_how_many_batches_a_step_has(
    tmp_path: Path, toy_cache: Path, toy_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate's own variable would make its optimiser skip steps, so a run would end where it began."""
    expected = metrics(train(config(tmp_path / "a", toy_cache, toy_student, steps=3)))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    found = metrics(train(config(tmp_path / "b", toy_cache, toy_student, steps=3)))
    assert without_times(found) == without_times(expected)


def test_a_chunked_head_changes_nothing(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    whole = metrics(train(config(tmp_path / "a", toy_cache, toy_student, token_pairs="drawn")))
    parts = metrics(train(config(tmp_path / "b", toy_cache, toy_student, token_pairs="drawn", logits_chunk=7)))
    for one, two in zip(whole, parts, strict=True):
        assert math.isclose(one["loss"], two["loss"], rel_tol=1e-5)


def test_resuming_gives_the_run_that_was_never_stopped(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    options = {"steps": 7, "save_every": 3, "token_pairs": "drawn", "keep_checkpoints": 5}
    whole = train(config(tmp_path / "whole", toy_cache, toy_student, **options))
    again = train(config(tmp_path / "again", toy_cache, toy_student, **options))
    # as a kill in step 5 leaves it: a checkpoint of step 3, lines of steps 4 and 5, half a line more
    shutil.rmtree(again / "checkpoint-6")
    for name in ("run.json", "model.safetensors", "config.json"):
        (again / name).unlink()
    kept = (again / "metrics.jsonl").read_text().splitlines()[:5]
    (again / "metrics.jsonl").write_text("\n".join(kept) + '\n{"step": 6, "lo')
    train(config(again, toy_cache, toy_student, **options))
    assert without_times(metrics(again)) == without_times(metrics(whole))
    ours, theirs = load_file(again / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_step_that_does_not_fit_is_taken_in_smaller_parts(
    tmp_path: Path, toy_cache: Path, toy_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"batch_size": 4, "save_every": 2}
    whole = train(config(tmp_path / "whole", toy_cache, toy_student, **options))
    evaluate, num_steps = Objective.__call__, 0

    def does_not_fit(*arguments: Any, **given: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return evaluate(*arguments, **given)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "__call__", does_not_fit)
        with pytest.raises(UserError, match=r"training ran out of memory: CUDA .*of 4 rows.*Halve --batch-size and"):
            train(config(tmp_path / "run", toy_cache, toy_student, **options))
    options |= {"batch_size": 2, "gradient_accumulation_steps": 2}
    resumed = train(config(tmp_path / "run", toy_cache, toy_student, **options))
    assert [line["step"] for line in metrics(resumed)] == [1, 2, 3, 4]
    ours, theirs = (load_file(run / "model.safetensors") for run in (resumed, whole))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-4)


def test_a_complete_run_is_left_alone_and_another_is_refused(
    tmp_path: Path, toy_cache: Path, toy_student: Path
) -> None:
    out = train(config(tmp_path / "run", toy_cache, toy_student))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    train(config(out, toy_cache, toy_student))
    with pytest.raises(UserError, match=r"holds another run; differing: options\.beta: 1\.0 -> 0\.3"):
        train(config(out, toy_cache, toy_student, beta=0.3))
    with pytest.raises(UserError, match="is not empty and holds no run of dpkd"):
        train(config(tmp_path, toy_cache, toy_student))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def edit_record(run: Path, **options: Any) -> None:
    """Change options in the record of a run; `...` removes one, as if an earlier version had not known it."""
    path = run / "dpkd-run.json"
    record = json.loads(path.read_text())
    record["options"] = {key: value for key, value in (record["options"] | options).items() if value is not ...}
    path.write_text(json.dumps(record))


def test_an_option_that_the_record_does_not_know_has_its_default(
    tmp_path: Path, toy_cache: Path, toy_student: Path
) -> None:
    out = train(config(tmp_path / "run", toy_cache, toy_student, beta=0.5))
    edit_record(out, on_alarm=..., cache_weights=..., top_k=..., lora_target_modules=...)
    train(config(out, toy_cache, toy_student, beta=0.5))
    with pytest.raises(UserError, match=r"another run; differing: options\.top_k: null -> 4 \(in"):
        train(config(out, toy_cache, toy_student, beta=0.5, top_k=4))
    edit_record(out, beta=...)
    with pytest.raises(UserError, match=r"another run; differing: options\.beta: 1\.0 -> 0\.5 \(in"):
        train(config(out, toy_cache, toy_student, beta=0.5))
    edit_record(out, beta=0.5, teacher_token="argmax")
    with pytest.raises(UserError, match=r'another run; differing: options\.teacher_token: "argmax" -> null'):
        train(config(out, toy_cache, toy_student, beta=0.5))


@pytest.mark.parametrize("name", ["token_pairs", "dropout", "minillm_clip"])
def test_an_option_that_changed_what_its_absence_computed_is_refused(
    tmp_path: Path, toy_cache: Path, toy_student: Path, name: str
) -> None:
    out = train(config(tmp_path / "run", toy_cache, toy_student, steps=1))
    edit_record(out, **{name: ...})
    with pytest.raises(UserError, match=rf'another run; differing: options\.{name}: "as an earlier version" -> '):
        train(config(out, toy_cache, toy_student, steps=1))


def test_what_is_saved_and_checked_changes_no_number(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    """Also in the middle of a run, whose record may have these options, as those of earlier versions do."""
    shared = {"steps": 7, "token_pairs": "drawn", "validation_examples": 4, "validate_every": 2}
    whole = train(config(tmp_path / "whole", toy_cache, toy_student, save_every=None, **shared))
    often = {"save_every": 1, "keep_checkpoints": 9, "verify": "read"}
    run = train(config(tmp_path / "run", toy_cache, toy_student, **often, **shared))
    weights = load_file(whole / "model.safetensors")
    for resumed_from in (None, 3):
        if resumed_from is not None:
            edit_record(run, follow_timeout_s=600, **often)
            for name in ("run.json", "model.safetensors", *(f"checkpoint-{step}" for step in range(4, 7))):
                shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
            train(config(run, toy_cache, toy_student, save_every=2, keep_checkpoints=1, **shared))
            assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-6"]
        assert without_times(metrics(run)) == without_times(metrics(whole))
        assert (run / "validation.jsonl").read_text() == (whole / "validation.jsonl").read_text()
        assert all(torch.equal(value, weights[name]) for name, value in load_file(run / "model.safetensors").items())


def test_what_a_kill_left_of_the_first_write_is_in_nobodys_way(
    tmp_path: Path, toy_cache: Path, toy_student: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / ".dpkd-run.12345.tmp.json").write_text('{"options"')
    train(config(out, toy_cache, toy_student, steps=1))
    assert (out / "run.json").is_file()


def test_a_kill_between_the_two_records_of_a_run_loses_none(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    whole = train(config(tmp_path / "whole", toy_cache, toy_student, steps=1))
    (tmp_path / "run").mkdir()
    shutil.copy(whole / "dpkd-run.json", tmp_path / "run")
    resumed = train(config(tmp_path / "run", toy_cache, toy_student, steps=1))
    ours, theirs = ((run / "dpkd.toml").read_text() for run in (resumed, whole))
    assert ours.replace(str(resumed), str(whole)) == theirs


def test_a_damaged_checkpoint_is_named(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    out = train(config(tmp_path / "run", toy_cache, toy_student, save_every=2))
    (out / "run.json").unlink()
    weights = out / "checkpoint-2" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    message = r"the checkpoint's model\.safetensors is corrupt \(checksum mismatch\): .*checkpoint-2"
    with pytest.raises(UserError, match=message):
        train(config(out, toy_cache, toy_student, save_every=2))


def test_sft_on_data_needs_no_teacher(tmp_path: Path, toy_data: Path, toy_student: Path) -> None:
    out = train(
        TrainConfig(
            out=tmp_path / "run",
            data=str(toy_data),
            student=str(toy_student),
            objective="sft",
            steps=2,
            batch_size=4,
            template="chat",
            device="cpu",
        )
    )
    lines = metrics(out)
    assert lines[0]["reward_chosen"] is None
    assert math.isclose(lines[0]["loss"], lines[0]["loss_sft"], rel_tol=1e-6)
    assert lines[0]["unfinished_chosen"] == 0
    cut = {"data": str(toy_data), "student": str(toy_student), "template": "chat", "device": "cpu", "objective": "sft"}
    out = train(TrainConfig(out=tmp_path / "cut", steps=1, batch_size=4, max_new_tokens=2, **cut))
    assert (metrics(out)[0]["unfinished_chosen"], metrics(out)[0]["chosen_length"]) == (1, 2)


def test_data_may_move(tmp_path: Path, toy_data: Path, toy_student: Path) -> None:
    data = Path(shutil.copy(toy_data, tmp_path / "rows.jsonl"))
    options: dict[str, Any] = {"objective": "sft", "template": "chat", "steps": 1, "batch_size": 2, "device": "cpu"}
    out = train(TrainConfig(out=tmp_path / "run", data=str(data), student=str(toy_student), **options))
    edit_record(out, data=str(data))
    (tmp_path / "moved").mkdir()
    moved = data.rename(tmp_path / "moved" / "rows.jsonl")
    train(TrainConfig(out=out, data=str(moved), student=str(toy_student), **options))
    moved.write_text(moved.read_text() + moved.read_text().splitlines()[0].replace('"id"', '"no id"') + "\n")
    with pytest.raises(UserError, match=r"another run; differing: data\.sha256: "):
        train(TrainConfig(out=out, data=str(moved), student=str(toy_student), **options))


def test_data_with_tokens_that_the_student_has_no_embedding_for(
    tmp_path: Path, toy_student: Path, write_rows: Callable[..., Path]
) -> None:
    """A token added to the tokenizer without widening the model: said at the start, with the number of rows."""
    student = Path(shutil.copytree(toy_student, tmp_path / "student"))
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(student)
    data = write_rows([{"instruction": f"Say {word}.", "output": word} for word in ("this", "<new>", "that <new>")])
    options = {"data": str(data), "student": str(student), "objective": "sft", "batch_size": 1, "device": "cpu"}
    with pytest.raises(
        UserError,
        match=r"the data contains token ids that the student has no embedding for: found 2 of 3 rows with ids up to "
        r"600, expected ids below 600 \(in .*data\.jsonl\)",
    ):
        train(TrainConfig(out=tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_nan_stops_before_the_update(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    broken = shutil.copytree(toy_student, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"logits are not numbers before the first step: found NaN .*broken"):
        train(config(tmp_path / "run", toy_cache, broken))
    exploding = config(tmp_path / "exploding", toy_cache, toy_student, learning_rate=1e38, warmup_ratio=0.0)
    with pytest.raises(UserError, match=r"is (nan|inf) at step 2; stopped before the update \(in rows dolly-"):
        train(exploding)
    assert [line["step"] for line in metrics(exploding.out)] == [1]
    assert not (exploding.out / "run.json").exists()


def test_what_the_cache_must_hold(
    tmp_path: Path, cache_copy: Path, toy_teacher: Path, toy_student: Path, other_student: Path, toy_data: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"the student's tokenizer is not the cache's: found .*other-student"):
        train(config(out, cache_copy, other_student))
    with pytest.raises(UserError, match="the cache has no such round: found 'r7', expected 'r0'"):
        train(config(out, cache_copy, toy_student, level="sequence", round="r7"))
    bare = tmp_path / "bare"
    build_cache(
        CacheConfig(
            teacher=str(toy_teacher),
            data=str(toy_data),
            out=bare,
            engine="transformers",
            template="chat",
            max_new_tokens=4,
            top_k=0,
            limit=6,
        )
    )
    with pytest.raises(UserError, match="the cache has no distributions, which --objective dpkd --level token needs"):
        train(config(out, bare, toy_student))
    with pytest.raises(UserError, match="holds no reference responses: found teacher, expected reference"):
        train(config(out, bare, toy_student, objective="sft", responses="reference"))
    with pytest.raises(
        UserError, match="a step takes more rows than there are: found 50 rows a step, expected at most 40"
    ):
        train(config(out, cache_copy, toy_student, batch_size=50))
    shard = next((cache_copy / "shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 16
    shard.write_bytes(data)
    with pytest.raises(UserError, match="a shard of the cache is corrupt"):
        train(config(out, cache_copy, toy_student))
    (cache_copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="it has no manifest"):
        train(config(out, cache_copy, toy_student))
    assert not out.exists()


def test_a_row_longer_than_the_positions_is_refused_at_the_start(
    tmp_path: Path, toy_cache: Path, toy_student: Path
) -> None:
    short = shutil.copytree(toy_student, tmp_path / "short")
    settings = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 24}))
    with pytest.raises(
        UserError,
        match=r"the longest row is longer than the student's positions: found \d+ tokens, expected at most 24",
    ):
        train(config(tmp_path / "run", toy_cache, short))
    assert not (tmp_path / "run").exists()


def test_cuda_is_used_where_it_is_and_refused_where_it_is_not(
    tmp_path: Path, toy_cache: Path, toy_student: Path
) -> None:
    asked = config(tmp_path / "run", toy_cache, toy_student, device="cuda", steps=1)
    if torch.cuda.is_available():
        assert len(metrics(train(asked))) == 1
    else:
        with pytest.raises(UserError, match="CUDA was requested but is not available"):
            train(asked)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3, "epochs": 2}, "--steps or --epochs"),
        ({"level": "sequence"}, "needs --round"),
        ({"level": "sequence", "student_samples": "forced"}, "takes --student-samples cached"),
        ({"student_samples": "forced", "round": "r"}, "--student-samples forced takes no --round"),
        ({"level": "token", "student_samples": "cached"}, "needs --round NAME"),
        ({"objective": "cpo"}, "--objective cpo compares whole responses: give --level sequence"),
        ({"objective": "akl", "level": "sequence"}, "--level sequence needs a preference"),
        ({"objective": "minillm"}, "minillm takes --round NAME, responses .* or live"),
        ({"objective": "seqkd", "responses": "reference"}, "leave --responses out"),
        ({"objective": "sft", "student_samples": "forced"}, "takes no --student-samples"),
        ({"student_samples": "live"}, "needs --teacher-url"),
        ({"teacher_url": ["http://localhost:1"]}, "goes with --student-samples live"),
        ({"preset": "paper", "round": "r0"}, "needs --lm-data"),
        ({"dpkd_weight": 0, "sft_weight": 1}, "--dpkd-weight 0 leaves nothing"),
        ({"objective": "kd", "dpkd_weight": 1}, "--dpkd-weight does not go with --objective kd"),
        ({"objective": "ipo", "token_pairs": "drawn", "label_smoothing": 0.1}, "goes with a preference other than ipo"),
        ({"data": "x.jsonl"}, "--data replaces --cache and needs --objective sft"),
        ({"cache": None}, "`cache` .or `data`. is required"),
        ({"bogus": 1}, "unknown option `bogus` .in here"),
        ({"batch_size": "many"}, "`batch_size` must be a whole number, found many"),
    ],
)
def test_options_that_contradict(options: dict[str, Any], message: str) -> None:
    values = {"cache": "c", "student": "s", "out": "o"} | options
    with pytest.raises(UserError, match=message):
        TrainConfig.parse({key: value for key, value in values.items() if value is not None}, where="here")


def test_bfloat16_autocast_keeps_the_loss_in_float32(
    tmp_path: Path, toy_cache: Path, toy_student: Path, write_rows: Callable[..., Path]
) -> None:
    full = metrics(train(config(tmp_path / "a", toy_cache, toy_student, steps=2)))
    half = metrics(train(config(tmp_path / "b", toy_cache, toy_student, steps=2, dtype="bfloat16")))
    assert math.isclose(full[0]["loss"], half[0]["loss"], rel_tol=0.05)
    assert full[0]["loss"] != half[0]["loss"]


@pytest.mark.parametrize("options", [{}, {"level": "sequence", "round": "r0"}], ids=["token", "sequence"])
def test_batches_by_tokens_read_every_row_once_an_epoch(
    tmp_path: Path, toy_cache: Path, toy_student: Path, options: dict[str, Any]
) -> None:
    """An epoch by a token budget learns from as many tokens as an epoch of fixed batches, in other steps."""
    by_rows = {"steps": None, "epochs": 1, "batch_size": 1, **options}
    fixed = metrics(train(config(tmp_path / "a", toy_cache, toy_student, **by_rows)))
    budget = metrics(train(config(tmp_path / "b", toy_cache, toy_student, batch_tokens=900, **by_rows)))
    assert len(budget) < len(fixed)
    assert sum(line["tokens"] for line in budget) == sum(line["tokens"] for line in fixed)
    again = train(config(tmp_path / "c", toy_cache, toy_student, batch_tokens=900, **by_rows))
    assert without_times(metrics(again)) == without_times(budget)


def test_a_round_without_distributions_trains_pairs_and_refuses_what_reads_them(
    tmp_path: Path, toy_cache: Path, toy_teacher: Path, toy_student: Path
) -> None:
    cache = shutil.copytree(toy_cache, tmp_path / "cache")
    options: dict[str, Any] = {"teacher": str(toy_teacher), "out": cache, "engine": "transformers", "device": "cpu"}
    build_cache(CacheConfig(student=str(toy_student), round="bare", top_k=0, **options))
    paired = {"level": "sequence", "round": "bare", "sft_weight": 0.5, "kd_weight": 0.5}
    line = metrics(train(config(tmp_path / "run", cache, toy_student, steps=1, **paired)))[0]
    assert line["kld"] > 0
    assert line["loss_kd"] > 0
    with pytest.raises(UserError, match="the round has no distributions, which --objective forward-kl"):
        train(config(tmp_path / "kl", cache, toy_student, objective="forward-kl", round="bare"))
