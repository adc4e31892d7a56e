"""Rounds: how likely the student found what it drew, rounds of format 1, and the cache's generation settings."""

from __future__ import annotations

import json
import re
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.commands import Command, dpkd
from transformers import AutoModelForCausalLM

from dpkd.core.errors import UserError
from dpkd.core.identity import canonical_json, fingerprint
from dpkd.core.models import locate_model
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.training import train
from dpkd.teacher_cache.audit.verify import verify_cache
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.build.round_options import with_cache_options
from dpkd.teacher_cache.engines.engine import EngineOptions, GenerateRequest, Sampling, results_only
from dpkd.teacher_cache.engines.mixed_engine import MixedEngine
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.rows import CachedRow
from dpkd.teacher_cache.store.schema import ROW_SCHEMA
from dpkd.teacher_cache.store.shards import encode_shard

BuildRound = Callable[..., None]


@pytest.fixture
def build_round(cache_copy: Path, toy_teacher: Path, toy_student: Path) -> BuildRound:
    """Add a round to `cache_copy`."""

    def build(name: str, **options: Any) -> None:
        models = {"teacher": str(toy_teacher), "student": str(toy_student)}
        build_cache(CacheConfig(out=cache_copy, round=name, engine="transformers", **models, **options))

    return build


def rows_of(cache: TeacherCache, name: str) -> list[CachedRow]:
    round_ = cache.round(name)
    shards = [cache.read_round(round_, record) for record in cache.shards()]
    return [shard.row(index) for shard in shards for index in range(len(shard))]


def to_format_1(round_dir: Path) -> None:
    """Rewrite a round as version 1 of the format had it: without the columns of its own."""
    manifest = json.loads((round_dir / "manifest.json").read_text())
    records = []
    for record in manifest["shards"]:
        table = pq.read_table(round_dir / record["path"]).select(ROW_SCHEMA.names).cast(ROW_SCHEMA)
        data, fresh = encode_shard(table, record["path"], record["origin"])
        (round_dir / record["path"]).write_bytes(data)
        records.append(record | {"sha256": fresh.sha256, "num_bytes": fresh.num_bytes})
    del manifest["manifest_sha256"]
    manifest |= {"format_version": 1, "shards": records}
    signed = manifest | {"manifest_sha256": fingerprint(manifest)}
    (round_dir / "manifest.json").write_bytes(canonical_json(signed) + b"\n")


def test_a_round_keeps_how_likely_its_student_found_each_token(toy_cache: Path, toy_student: Path) -> None:
    """Against a forward pass of transformers over prompt and response, in float64."""
    model = AutoModelForCausalLM.from_pretrained(toy_student).double()
    for row in rows_of(TeacherCache.open(toy_cache), "r0")[:12]:
        ids = torch.tensor(np.concatenate([row.prompt_ids, row.response_ids]).astype(np.int64))[None]
        with torch.no_grad():
            log_q = model(ids).logits[0].log_softmax(1)
        places = torch.arange(len(row.prompt_ids) - 1, ids.shape[1] - 1)
        expected = log_q[places, ids[0, 1:][places]]
        assert row.sampling_logprobs is not None
        np.testing.assert_allclose(row.sampling_logprobs, expected.numpy(), atol=1e-4)


def test_rounds_of_format_1_are_still_read(cache_copy: Path, toy_student: Path, tmp_path: Path) -> None:
    new = rows_of(TeacherCache.open(cache_copy), "r0")
    to_format_1(cache_copy / "rounds" / "r0")
    assert verify_cache(cache_copy)["rounds"] == 1
    old = rows_of(TeacherCache.open(cache_copy), "r0")
    assert [row.response_ids.tolist() for row in old] == [row.response_ids.tolist() for row in new]
    assert all(row.sampling_logprobs is None for row in old)
    options = {"cache": cache_copy, "student": str(toy_student), "device": "cpu", "tracker": "none", "steps": 1}
    train(TrainConfig(**options, out=tmp_path / "dpkd", level="sequence", round="r0"))
    with pytest.raises(UserError, match=r"does not say how likely its tokens were.*found format 1, expected format 2"):
        train(TrainConfig(**options, out=tmp_path / "minillm", objective="minillm", round="r0"))


def test_a_cache_keeps_format_1_and_a_round_has_format_2(toy_cache: Path) -> None:
    """So that an older version reads a cache as before and says why it cannot read a round."""
    assert json.loads((toy_cache / "manifest.json").read_text())["format_version"] == 1
    assert json.loads((toy_cache / "rounds" / "r0" / "manifest.json").read_text())["format_version"] == 2
    shard = next((toy_cache / "shards").glob("*.parquet"))
    assert pq.read_schema(shard).names == ROW_SCHEMA.names


def test_a_round_takes_the_caches_generation_settings(
    build_round: BuildRound, cache_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The toy cache has responses of at most 12 tokens; the option's default is 256."""
    build_round("same", top_k=0)
    assert "are drawn with" not in capsys.readouterr().err
    cache = TeacherCache.open(cache_copy)
    assert cache.round("same").manifest.identities["generation"]["max_new_tokens"] == 12
    assert max(len(row.response_ids) for row in rows_of(cache, "same")) == 12


def test_other_generation_settings_are_taken_if_they_are_given_and_said_in_one_line(
    build_round: BuildRound, cache_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_round("other", top_k=0, max_new_tokens=5, temperature=0.5)
    lines = [line for line in capsys.readouterr().err.splitlines() if "are drawn with" in line]
    assert len(lines) == 1
    assert (
        "max_new_tokens 5, temperature 0.5; those of the cache were with max_new_tokens 12, temperature 1.0" in lines[0]
    )
    generation = TeacherCache.open(cache_copy).round("other").manifest.identities["generation"]
    assert (generation["max_new_tokens"], generation["temperature"]) == (5, 0.5)
    build_round("other", top_k=0, max_new_tokens=5, temperature=0.5)  # finished: nothing to do


@pytest.mark.parametrize(("option", "value"), [("thinking", "drop"), ("template_arg", {"enable_thinking": "false"})])
def test_a_round_refuses_options_of_prompts_that_it_would_not_use(
    option: str, value: object, build_round: BuildRound
) -> None:
    with pytest.raises(
        UserError, match=rf"a round uses the {option} of its cache: .*Leave --{option.replace('_', '-')}"
    ):
        build_round("other", **{option: value})


@pytest.mark.parametrize(
    ("option", "of_cache"),
    [
        ("dtype", "bfloat16"),
        ("template", "chat"),
        ("limit", 20),
        ("responses", "both"),
        ("num_samples", 2),
        ("max_prompt_tokens", 80),
        ("rows_per_shard", 6),
        ("turns", "all"),
        ("thinking", "drop"),
        ("template_arg", {"enable_thinking": "false"}),
    ],
)
def test_a_round_refuses_a_default_that_is_not_its_caches(option: str, of_cache: object, cache_copy: Path) -> None:
    """An option that somebody wrote down, with a value that only looks as if nobody had."""
    cache, default = TeacherCache.open(cache_copy), CacheConfig.model_fields[option].default
    identities = cache.manifest.identities
    place = {
        "dtype": "teacher", "template": "template", "limit": "data", "rows_per_shard": "layout",
        "template_arg": "template",
    }.get(option, "generation")  # fmt: skip
    name = {"template": "name", "template_arg": "args"}.get(option, option)
    identities[place][name] = of_cache
    options: dict[str, Any] = {"teacher": "t", "student": "s", "round": "other", "out": str(cache_copy)}
    found = re.escape(f"found {'none' if default is None else default}, expected {of_cache}")
    with pytest.raises(UserError, match=rf"a round uses the {option} of its cache: {found} .*Leave --"):
        with_cache_options(cache, CacheConfig(**options | {option: default}))
    for given in ({}, {option: of_cache}):  # left out, or that of the cache
        config = with_cache_options(cache, CacheConfig(**options | given))
        assert getattr(config, option) == of_cache
        again = CacheConfig.parse(tomllib.loads(config.to_toml()), where="its dpkd.toml")
        assert with_cache_options(cache, again) == config


def test_the_command_refuses_options_that_a_round_would_not_read(
    cache_copy: Path, toy_teacher: Path, toy_student: Path
) -> None:
    models = ("--teacher", toy_teacher, "--student", toy_student, "--engine", "transformers")
    command = ("cache-teacher", *models, "--out", cache_copy, "--round", "other")
    for given, found in (
        (("--template", "alpaca"), "found alpaca, expected chat"),
        (("--responses", "teacher"), "found teacher, expected both"),
        (("--rows-per-shard", "128"), "found 128, expected 6"),
        (("--turns", "all"), "found all, expected last"),
    ):
        done = dpkd(*command, *given)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"a round uses the {given[0][2:].replace('-', '_')} of its cache: {found}" in done.stderr
        assert f"Leave {given[0]} out" in done.stderr
    assert not (cache_copy / "rounds" / "other").exists()


def test_turns_that_made_no_difference_to_the_cache_are_those_of_the_round(
    tmp_path: Path, toy_teacher: Path, toy_student: Path, toy_data: Path
) -> None:
    """The options of a recipe for several data sets: rows of one turn leave no trace of --turns in the identity."""
    options: dict[str, Any] = {
        "teacher": str(toy_teacher), "out": str(tmp_path / "cache"), "engine": "transformers", "device": "cpu",
        "turns": "all", "max_new_tokens": 4, "top_k": 0, "limit": 2, "template": "chat",
    }  # fmt: skip
    build_cache(CacheConfig(**options, data=str(toy_data)))
    build_cache(CacheConfig(**options, student=str(toy_student), round="r0"))
    saved = tomllib.loads((tmp_path / "cache" / "rounds" / "r0" / "dpkd.toml").read_text())
    assert saved["turns"] == "all"
    build_cache(CacheConfig.parse(saved, where="its dpkd.toml"))  # finished: nothing to do


def test_saved_options_that_cannot_be_read_are_not_replaced_by_a_default(cache_copy: Path) -> None:
    cache, saved = TeacherCache.open(cache_copy), cache_copy / "dpkd.toml"
    config = CacheConfig(teacher="t", student="s", round="other", out=str(cache_copy))
    assert with_cache_options(cache, config).turns == "last"
    for content, problem in ((b"turns = all", "is not TOML: "), (b"\xff", "is not TOML: "), (None, "is missing ")):
        saved.unlink() if content is None else saved.write_bytes(content)
        with pytest.raises(UserError, match=rf"the file of options {problem}.*dpkd\.toml\)\. Restore it"):
            with_cache_options(cache, config)


def test_minillm_refuses_a_round_of_another_distribution(
    build_round: BuildRound, cache_copy: Path, toy_student: Path, tmp_path: Path
) -> None:
    build_round("cold", temperature=0.5)
    options = {"cache": cache_copy, "student": str(toy_student), "device": "cpu", "tracker": "none", "steps": 1}
    with pytest.raises(
        UserError, match=r"not drawn from the student's own distribution.*found temperature 0\.5, top_p"
    ):
        train(TrainConfig(**options, out=tmp_path / "run", objective="minillm", round="cold"))
    assert not (tmp_path / "run").exists()


def test_a_round_without_distributions_is_refused_by_distillm2(
    build_round: BuildRound, cache_copy: Path, toy_student: Path, tmp_path: Path
) -> None:
    build_round("bare", top_k=0)
    options = {"cache": cache_copy, "student": str(toy_student), "device": "cpu", "tracker": "none", "steps": 1}
    with pytest.raises(UserError, match="the round has no distributions, which --objective distillm2 needs"):
        train(TrainConfig(**options, out=tmp_path / "run", objective="distillm2", round="bare"))
    build_round("few", top_k=4)  # its cache keeps 16
    for given in ({"objective": "distillm2"}, {"objective": "jsd"}, {"objective": "jsd", "mix": 0.5}):
        with pytest.raises(UserError, match="top_k is more than the round keeps: found top_k 8, expected at most 4"):
            train(TrainConfig(**options, out=tmp_path / "run", round="few", top_k=8, **given))


@pytest.mark.parametrize("objective", ["distillm2", "minillm"])
def test_training_on_a_round_writes_what_it_measured(
    toy_cache: Path, toy_student: Path, tmp_path: Path, objective: str
) -> None:
    """At the first step the student is the one that drew the round: no token has moved, and its gaps are its own."""
    options = {"device": "cpu", "tracker": "none", "steps": 3, "validation_examples": 4, "learning_rate": 3e-3}
    out = tmp_path / "run"
    train(
        TrainConfig(cache=str(toy_cache), student=str(toy_student), out=out, objective=objective, round="r0", **options)
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    if objective == "minillm":
        assert lines[0]["clipped_share"] == 0
        assert lines[-1]["clipped_share"] > 0
    else:
        assert 0 < lines[0]["skew_gap_rejected"] < 1
        assert lines[0]["skew"] == pytest.approx(0.1)
        validation = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
        assert validation[-1]["kld"] < validation[0]["kld"]


def logprobs_by(model_dir: Path, row: CachedRow, response: np.ndarray) -> np.ndarray:
    """Log-probs of all next tokens at the positions of a response, by a forward pass in float64."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).double()
    ids = torch.tensor(np.concatenate([row.prompt_ids, response]).astype(np.int64))[None]
    with torch.no_grad():
        log_TV = model(ids).logits[0].log_softmax(1).numpy()
    return log_TV[len(row.prompt_ids) - 1 : -1]


def test_a_round_of_a_mixture_keeps_the_mixtures_logprobs(
    build_round: BuildRound, cache_copy: Path, toy_teacher: Path, toy_student: Path
) -> None:
    """log(0.2 p + 0.8 q) of each token, given the tokens before it; also of the cache's responses."""
    build_round("mixed", teacher_mix=0.2, score_cached=True)
    cache = TeacherCache.open(cache_copy)
    round_, record = cache.round("mixed"), cache.shards("teacher")[0]
    ours, theirs = cache.read(record), cache.read_round(round_, record)
    for index in range(3):
        row, cached = theirs.row(index), ours.row(index)
        for response, found in ((row.response_ids, row.sampling_logprobs), (cached.response_ids, None)):
            log_p, log_q = (logprobs_by(model, row, response) for model in (toy_teacher, toy_student))
            mixed = np.logaddexp(np.log(0.2) + log_p, np.log(0.8) + log_q)
            expected = np.take_along_axis(mixed, response[:, None].astype(np.int64), axis=1)[:, 0]
            if found is None:
                assert row.cached_sampling_logprob == pytest.approx(expected.sum(), abs=1e-3)
            else:
                np.testing.assert_allclose(found, expected, atol=1e-4)


def test_tokens_of_a_mixture_follow_it(toy_teacher: Path, toy_student: Path) -> None:
    """4,000 first tokens: where the models differ most, their frequency is the mixture's and neither model's own."""
    student, teacher = (locate_model(str(path), "model") for path in (toy_student, toy_teacher))
    prompt = [5, 6, 7]
    with MixedEngine(student, teacher, EngineOptions(max_length=8, top_k=0, dtype="float32"), 0.5) as engine:
        requests = [GenerateRequest(index, prompt, seed=index) for index in range(4000)]
        results = results_only(engine.generate(requests, Sampling(1.0, 1.0, 1, (0,))))
        drawn = np.array([int(result.response_ids[0]) for result in results])
    last = CachedRow("r", 0, "student", "stop", np.array(prompt), np.zeros(1), np.zeros(1), None)
    p, q = (np.exp(logprobs_by(path, last, np.array([0]))[0]) for path in (toy_teacher, toy_student))
    token = int(np.abs(p - q).argmax())
    share, expected = float((drawn == token).mean()), 0.5 * (p[token] + q[token])
    spread = np.sqrt(expected * (1 - expected) / len(drawn))
    assert abs(share - expected) < 4 * spread
    assert min(abs(share - p[token]), abs(share - q[token])) > 6 * spread


def test_minillm_learns_from_a_mixture(
    build_round: BuildRound, cache_copy: Path, toy_student: Path, tmp_path: Path
) -> None:
    """The first step's tokens were drawn from the mixture: their weights q / mixture are not all 1."""
    build_round("mixed", teacher_mix=0.2)
    options = {"cache": cache_copy, "student": str(toy_student), "device": "cpu", "tracker": "none", "steps": 1}
    train(TrainConfig(**options, out=tmp_path / "run", objective="minillm", round="mixed"))
    assert 0 < json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["clipped_share"] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_mix": 0.2, "engine": "vllm"}, "--teacher-mix needs both models at once"),
        ({"teacher_mix": 0.2, "engine_arg": "quantization=fp8"}, "--engine-arg is for vLLM; --teacher-mix needs"),
        ({"teacher_mix": 0.2, "temperature": 0.5}, "leave --temperature and --top-p at 1"),
        ({"teacher_mix": 0.2, "round": None, "student": None, "data": "d"}, "--teacher-mix goes with --round"),
        ({"score_cached": True, "round": None, "student": None, "data": "d"}, "--score-cached goes with --round"),
    ],
)  # fmt: skip
def test_a_mixture_that_cannot_be_drawn_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CacheConfig.parse({"teacher": "t", "student": "s", "out": "o", "round": "r"} | options, where="a test")


def test_the_offset_of_pairs_is_that_of_both_models(
    build_round: BuildRound, cache_copy: Path, toy_teacher: Path, toy_student: Path, tmp_path: Path
) -> None:
    """The first step's loss by hand: beta R from the caches' own log-probs, log p/q0 from float64 forward passes."""
    build_round("scored", score_cached=True)
    options = {"cache": cache_copy, "student": str(toy_student), "device": "cpu", "tracker": "none", "steps": 1}
    pairs = {
        "level": "sequence",
        "round": "scored",
        "offset": True,
        "length_normalize": False,
        "beta": 0.5,  # at 1 the margin starts at 0
        "kd_weight": 0.0,
        "batch_size": 20,
        "validation_examples": 0,
    }
    train(TrainConfig(**options, **pairs, out=tmp_path / "run", warmup_ratio=0.0))
    cache = TeacherCache.open(cache_copy)
    round_ = cache.round("scored")
    losses = []
    for record in cache.shards("teacher"):
        ours, theirs = cache.read(record), cache.read_round(round_, record)
        for index in range(len(theirs)):
            student_row = theirs.row(index)
            margin = 0.0
            for row, sign in ((ours.row(index), 1), (student_row, -1)):
                token = row.response_ids[:, None].astype(np.int64)
                log_p, log_q = (
                    np.take_along_axis(logprobs_by(path, row, row.response_ids), token, axis=1).sum()
                    for path in (toy_teacher, toy_student)
                )
                # before the first step q is q0
                margin += sign * (0.5 * (log_q - log_p) + log_p - log_q)
            losses.append(np.log1p(np.exp(-margin)))
    assert len(losses) == 20
    found = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["loss"]
    assert found == pytest.approx(np.mean(losses), rel=1e-3)


def test_the_offset_is_refused_without_what_it_compares(
    build_round: BuildRound, cache_copy: Path, toy_student: Path, tmp_path: Path
) -> None:
    build_round("short", top_k=0, score_cached=True, max_new_tokens=5)
    options = {"cache": cache_copy, "student": str(toy_student), "out": tmp_path / "run", "device": "cpu"}
    pairs = {"level": "sequence", "offset": True, "length_normalize": False}
    with pytest.raises(UserError, match="the round has no scores of the cache's responses, which --offset needs"):
        train(TrainConfig(**options, **pairs, round="r0"))
    with pytest.raises(UserError, match=r"drawn with other settings than the cache.*max_new_tokens': 5"):
        train(TrainConfig(**options, **pairs, round="short"))
    for more, message in (
        ({"length_normalize": True}, "--offset needs --no-length-normalize"),
        ({"label_smoothing": 0.5}, "only without --label-smoothing"),
        ({"pairing": "all"}, "leave --pairing and --responses out"),
        ({"objective": "cpo"}, "--offset needs --objective dpkd"),
        ({"level": "token"}, "--offset needs --objective dpkd with --level sequence"),
    ):
        with pytest.raises(UserError, match=message):
            TrainConfig.parse({**options, **pairs, "round": "short", **more}, where="a test")


def test_a_killed_round_resumes_in_any_of_its_phases(
    cache_copy: Path, toy_teacher: Path, toy_student: Path, build_round: BuildRound
) -> None:
    """SIGKILL once the student has begun to score the cache's responses: the round is that without a kill."""
    build_round("whole", score_cached=True, teacher_mix=0.2)
    round_dir = cache_copy / "rounds" / "killed"
    arguments = ["cache-teacher", "--teacher", toy_teacher, "--student", toy_student, "--out", cache_copy]
    arguments += ["--round", "killed", "--engine", "transformers", "--score-cached", "--teacher-mix", "0.2"]
    process = Command(*map(str, arguments))
    while not list((round_dir / "scored" / "ledger").glob("[!.]*.json")):
        assert process.poll() is None, process.stderr
        time.sleep(0.001)
    process.kill()
    process.finish()
    assert not (round_dir / "manifest.json").exists()
    build_round("killed", score_cached=True, teacher_mix=0.2)
    assert sorted(path.name for path in round_dir.iterdir()) == ["dpkd.toml", "manifest.json", "shards"]
    cache = TeacherCache.open(cache_copy)
    for row, expected in zip(rows_of(cache, "killed"), rows_of(cache, "whole"), strict=True):
        # which rows share a batch moves the last bits of a log-prob
        assert row.response_ids.tolist() == expected.response_ids.tolist()
        assert row.sampling_logprobs is not None
        assert expected.sampling_logprobs is not None
        np.testing.assert_allclose(row.sampling_logprobs, expected.sampling_logprobs, atol=1e-4)
        assert row.cached_sampling_logprob == pytest.approx(expected.cached_sampling_logprob, abs=1e-3)
