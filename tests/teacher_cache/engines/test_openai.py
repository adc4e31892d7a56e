"""A teacher behind an OpenAI-compatible endpoint: values against the model behind it, and endpoints that misbehave."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import Command, dpkd
from support.conversations import WEATHER, conversations, make_models, write
from support.judge_endpoints import Answer, failure
from support.openai_endpoint import check_values, end_is_unknown, rows_of, serving_toy

from dpkd.core.errors import UserError
from dpkd.core.models import locate_model
from dpkd.teacher_cache.audit.verify import verify_cache
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.engines.openai.engine import KEY_VARIABLE
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.manifest import Manifest
from dpkd.teacher_cache.store.reader import TeacherCache

NEW_TOKENS = 12
KEY = "sk-of-the-teacher-and-secret"


def options(url: str, teacher: Path, data: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "engine": "openai", "teacher_url": url, "teacher_model": "toy", "teacher": str(teacher), "data": str(data),
        "out": str(out), "template": "chat", "limit": 8, "max_new_tokens": NEW_TOKENS, "rows_per_shard": 3,
    } | more  # fmt: skip


@pytest.mark.parametrize("top_k", [5, 20])
@pytest.mark.parametrize("api", ["completions", "chat"])
def test_the_cache_has_the_models_values(
    api: str, top_k: int, toy_teacher: Path, toy_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    with serving_toy(toy_teacher, most=top_k) as (toy, endpoint):
        config = CacheConfig(**options(endpoint.url, toy_teacher, toy_data, out, teacher_api=api))
        manifest = build_cache(config)
        asked = len(endpoint.bodies)
        rows = rows_of(out)
        check_values(toy, rows, top_k, chat=api == "chat")
        assert endpoint.most_open > 1
    assert not manifest.failed
    assert len(rows) == 8
    # characters that are split over tokens came through: most of the toy's tokens are single bytes
    decoded = toy.tokenizer.convert_ids_to_tokens([token for row in rows for token in row.response_ids.tolist()])
    assert sum(len(toy.bytes[toy.tokenizer.convert_tokens_to_ids(token)]) == 1 for token in decoded) > 10
    # K was measured, and what nobody knows is recorded as unknown
    assert manifest.identities["logprobs"] | {"top_k": top_k, "end": "unknown"} == manifest.identities["logprobs"]
    assert manifest.identities["teacher"] == {
        "name": "toy", "revision": "unknown", "dtype": "unknown", "vocab_size": 600, "config_sha256": None,
        "weights_sha256": None,
    }  # fmt: skip
    template = "of the endpoint, unknown" if api == "chat" else "of this cache"
    assert manifest.identities["generation"]["endpoint"] == {
        "api": api, "prompt": "messages" if api == "chat" else "ids", "token_ids": False, "top_k": top_k,
        "prompt_tokens": "as the tokenizer", "model": "toy", "template": template, "end": "unknown",
    }  # fmt: skip
    verify_cache(out)
    # a finished cache needs no endpoint
    assert build_cache(config).fingerprint == manifest.fingerprint
    assert len(endpoint.bodies) == asked


def test_the_end_is_known_where_the_endpoint_shows_it(toy_teacher: Path, toy_data: Path, tmp_path: Path) -> None:
    found = {}
    for shows in (True, False):
        with serving_toy(toy_teacher, most=8, with_ids=shows, shows_end=shows) as (toy, endpoint):
            more = {"max_new_tokens": 60, "limit": 12}
            manifest = build_cache(
                CacheConfig(**options(endpoint.url, toy_teacher, toy_data, tmp_path / str(shows), **more))
            )
            found[shows] = rows_of(tmp_path / str(shows))
            check_values(toy, found[shows], 8)
            assert manifest.identities["logprobs"]["end"] == ("known" if shows else "unknown")
    stopped = [row for row in found[True] if row.finish_reason == "stop"]
    assert stopped, "no toy response ends: the test shows nothing"
    assert not any(end_is_unknown(row) for row in found[True])
    for known, unknown in zip(found[True], found[False], strict=True):
        np.testing.assert_array_equal(known.response_ids, unknown.response_ids)
        assert end_is_unknown(unknown) == (known.finish_reason == "stop")


def test_an_endpoint_that_clamps_is_measured_too(toy_teacher: Path, toy_data: Path, tmp_path: Path) -> None:
    with serving_toy(toy_teacher, most=7, clamps=True, accepts_ids=False) as (toy, endpoint):
        manifest = build_cache(CacheConfig(**options(endpoint.url, toy_teacher, toy_data, tmp_path / "cache")))
        assert manifest.identities["logprobs"]["top_k"] == 7
        assert manifest.identities["generation"]["endpoint"]["prompt"] == "text"
        check_values(toy, rows_of(tmp_path / "cache"), 7)
        with pytest.raises(UserError, match=r"fewer log-probs per position than --top-k: found 7, expected 8"):
            build_cache(CacheConfig(**options(endpoint.url, toy_teacher, toy_data, tmp_path / "other", top_k=8)))
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_an_end_that_is_written_as_nothing_is_the_eos(
    api: str, toy_teacher: Path, toy_data: Path, tmp_path: Path
) -> None:
    with serving_toy(toy_teacher, most=8, shows_end=True, empty_end=True) as (toy, endpoint):
        more = {"max_new_tokens": 60, "limit": 12, "teacher_api": api}
        manifest = build_cache(CacheConfig(**options(endpoint.url, toy_teacher, toy_data, tmp_path / "cache", **more)))
        found = rows_of(tmp_path / "cache")
    assert not manifest.failed
    stopped = [row for row in found if row.finish_reason == "stop"]
    assert stopped, "no toy response ends: the test shows nothing"
    for row in stopped:
        assert row.response_ids[-1] == 0
        full_TV = toy.logprobs(row.prompt_ids.tolist(), row.response_ids.tolist()).numpy()
        assert row.response_logprobs[-1] == pytest.approx(full_TV[-1, 0], abs=2e-4)
        assert row.distributions is not None
        assert row.distributions.counts_T[-1] > 0


def test_another_template_of_the_endpoint_is_recorded_and_said(
    toy_teacher: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def longer(answer: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
        answer["usage"]["prompt_tokens"] += 5  # a system prompt of its own
        return answer

    with serving_toy(toy_teacher, change=longer) as (_, endpoint):
        given = options(endpoint.url, toy_teacher, toy_data, tmp_path / "cache", teacher_api="chat")
        manifest = build_cache(CacheConfig(**given))
        assert manifest.identities["generation"]["endpoint"]["prompt_tokens"] == "others"
        assert "the teacher sees other prompts than the student will" in capsys.readouterr().err
        given = options(endpoint.url, toy_teacher, toy_data, tmp_path / "other", teacher_api="completions")
        with pytest.raises(UserError, match=r"reads prompts as other tokens than the tokenizer"):
            build_cache(CacheConfig(**given))


def test_completions_may_have_the_log_probs_of_chat(toy_teacher: Path, toy_data: Path, tmp_path: Path) -> None:
    with serving_toy(toy_teacher, chat_form=True) as (toy, endpoint):
        build_cache(CacheConfig(**options(endpoint.url, toy_teacher, toy_data, tmp_path / "cache")))
        check_values(toy, rows_of(tmp_path / "cache"), 5)


def test_a_top_mass_keeps_the_fewest_entries_that_reach_it(toy_teacher: Path, toy_data: Path, tmp_path: Path) -> None:
    with serving_toy(toy_teacher, most=9) as (toy, endpoint):
        given = options(endpoint.url, toy_teacher, toy_data, tmp_path / "cache", top_mass=0.1)
        manifest = build_cache(CacheConfig(**given))
        assert manifest.identities["logprobs"] | {"top_k": 9, "top_mass": 0.1} == manifest.identities["logprobs"]
        row = rows_of(tmp_path / "cache")[0]
        full_TV = np.exp(toy.logprobs(row.prompt_ids.tolist(), row.response_ids.tolist()).double().numpy())
    reached_TK = np.sort(full_TV, axis=1)[:, ::-1].cumsum(axis=1) >= 0.1
    known = len(full_TV) - end_is_unknown(row)
    assert row.distributions is not None
    expected_T = np.minimum(reached_TK.argmax(axis=1) + 1, 9)
    np.testing.assert_array_equal(row.distributions.counts_T[:known], expected_T[:known])
    assert len(set(expected_T.tolist())) > 2


def test_trouble_changes_no_byte(toy_teacher: Path, toy_data: Path, tmp_path: Path) -> None:
    with serving_toy(toy_teacher) as (_, endpoint):
        plain = build_cache(CacheConfig(**options(endpoint.url, toy_teacher, toy_data, tmp_path / "plain")))
    troubles: Iterator[Answer | None | str] = iter(
        [failure(429, retry_after="1"), failure(500), "stall", (200, {"content-length": "90000"}, b'{"choices": ['),
         (200, {}, b"<html>"), failure(503)]
    )  # fmt: skip

    def before(body: dict[str, Any]) -> Answer | None:
        trouble = next(troubles, None) if body["max_tokens"] == NEW_TOKENS else None
        if trouble == "stall":
            time.sleep(2.0)
            return None
        return trouble

    with serving_toy(toy_teacher, before=before) as (_, endpoint):
        more = {"timeout_s": 1.0, "tries": 7, "max_num_seqs": 2}
        config = CacheConfig(**options(endpoint.url, toy_teacher, toy_data, tmp_path / "tried", **more))
        tried = build_cache(config)
    assert next(troubles, "all of them came") == "all of them came"
    assert [shard.sha256 for shard in tried.shards] == [shard.sha256 for shard in plain.shards]


def test_a_rate_limit_pauses_all_requests(toy_teacher: Path, toy_data: Path, tmp_path: Path) -> None:
    times: list[float] = []

    def before(body: dict[str, Any]) -> Answer | None:
        if body["max_tokens"] != NEW_TOKENS:
            return None
        times.append(time.monotonic())
        return failure(429, retry_after="1") if len(times) == 1 else None

    with serving_toy(toy_teacher, before=before) as (_, endpoint):
        build_cache(CacheConfig(**options(endpoint.url, toy_teacher, toy_data, tmp_path / "out", max_num_seqs=1)))
        assert endpoint.most_open == 1
    assert times[1] - times[0] > 0.9


def named(answer: dict[str, Any], name: str) -> dict[str, Any]:
    return answer | {"model": name}


def test_an_endpoint_that_lies_about_its_model(toy_teacher: Path, toy_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    with serving_toy(toy_teacher, change=lambda answer, _: named(answer, "small-toy")) as (_, endpoint):
        result = dpkd("cache-teacher", *flags(options(endpoint.url, toy_teacher, toy_data, out)))
    assert result.returncode == 2
    assert (
        "error: the endpoint answers with another model: found small-toy, expected toy, or toy- with a"
        in (result.stderr.splitlines()[-1])
    )
    assert not out.exists()
    # a version of it is the same model, as OpenAI's own names are
    count = 0

    def changes(answer: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        nonlocal count
        count += body["max_tokens"] == NEW_TOKENS
        return named(answer, "toy-2026-01" if count <= 4 else "toy-2026-02")

    with serving_toy(toy_teacher, change=changes) as (_, endpoint):
        given = options(endpoint.url, toy_teacher, toy_data, out, max_num_seqs=1)
        result = dpkd("cache-teacher", *flags(given))
        assert result.returncode == 2
        assert "answers with another model than before: found toy-2026-02, expected toy-2026-01" in result.stderr
        # it is asked again and refused, until the model is back; no answer of the first model is paid for twice
        assert "the endpoint has changed since the job began: found model toy-2026-02" in (
            dpkd("cache-teacher", *flags(given)).stderr
        )
        count = -10
        asked = len(endpoint.bodies)
        result = dpkd("cache-teacher", *flags(given))
        assert result.returncode == 0, result.stderr
        assert sum(body["max_tokens"] == NEW_TOKENS for body in endpoint.bodies[asked:]) == 4
    assert len(rows_of(out)) == 8


def flags(given: dict[str, Any]) -> list[str]:
    return [part for key, value in given.items() for part in ("--set", f"{key}={value}")]


def truncated(choice: dict[str, Any]) -> None:
    """Log-probs of the first half only."""
    half = {key: values[: len(values) // 2] for key, values in choice["logprobs"].items()}
    choice["logprobs"] = half


def fewer(choice: dict[str, Any]) -> None:
    row = choice["logprobs"]["top_logprobs"][3]
    for key in list(row)[1:]:
        row.pop(key)


def too_much(choice: dict[str, Any]) -> None:
    choice["logprobs"]["top_logprobs"][2] = dict.fromkeys(choice["logprobs"]["top_logprobs"][2], -0.1)


def other_text(choice: dict[str, Any]) -> None:
    choice["text"] = choice["text"] + " and more"


def foreign_token(choice: dict[str, Any]) -> None:
    choice["logprobs"]["tokens"][1] = "no-such-token"


def cut(choice: dict[str, Any]) -> None:
    """The answer and its log-probs end early, and it claims to be complete."""
    truncated(choice)
    choice["text"] = "".join(choice["logprobs"]["tokens"])


def malformed(choice: dict[str, Any]) -> None:
    choice["logprobs"]["token_logprobs"][3] = None


def filtered(choice: dict[str, Any]) -> None:
    choice["finish_reason"] = "content_filter"


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (truncated, r"the tokens do not give the answer's text back"),
        (fewer, r"position 3 has 1 log-probs, not 5"),
        (too_much, r"the probabilities at position 2 sum to 4\.\d+|to 5\.\d+"),
        (other_text, r"the tokens do not give the answer's text back"),
        (foreign_token, r"'no-such-token' is not one token of the tokenizer"),
        (cut, r"log-probs of 6 tokens, and the answer has 12|the tokens do not give"),
        (malformed, r"the log-probs are malformed: TypeError"),
        (filtered, r"the endpoint ended the answer with 'content_filter'"),
    ],
)
def test_an_answer_that_does_not_fit_is_a_failed_row_with_the_reason(
    lie: Callable[[dict[str, Any]], None], reason: str, toy_teacher: Path, toy_data: Path, tmp_path: Path
) -> None:
    victim = "3"

    def change(answer: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        if body["max_tokens"] == NEW_TOKENS and answer["choices"][0]["finish_reason"] == "length":
            nonlocal victim
            if victim in ("3", str(body["seed"])):
                victim = str(body["seed"])
                lie(answer["choices"][0])
        return answer

    with serving_toy(toy_teacher, change=change) as (toy, endpoint):
        result = dpkd("cache-teacher", *flags(options(endpoint.url, toy_teacher, toy_data, tmp_path / "cache")))
        assert result.returncode == 3, result.stderr
        manifest = TeacherCache.open(tmp_path / "cache").manifest
        check_values(toy, rows_of(tmp_path / "cache"), 5)
    (failed,) = manifest.failed
    assert re.search(reason, failed["reason"]), failed
    verify_cache(tmp_path / "cache")


def test_an_endpoint_of_another_tokenizer_is_found_soon(
    toy_teacher: Path, other_student: Path, toy_data: Path, tmp_path: Path
) -> None:
    with serving_toy(other_student, accepts_ids=False) as (_, endpoint):
        with pytest.raises(UserError, match=r"as other tokens than the tokenizer|the first 8 answers of the endpoint"):
            build_cache(CacheConfig(**options(endpoint.url, toy_teacher, toy_data, tmp_path / "cache", limit=16)))
        assert len(endpoint.bodies) < 40


def cost_of(printed: str) -> float:
    return float(printed.split("the endpoint's answers cost ")[1].split()[0])


def test_a_budget_stops_the_job_and_the_next_run_goes_on(toy_teacher: Path, toy_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    with serving_toy(toy_teacher) as (_, endpoint):
        prices = {"price_in": 1e6, "price_out": 1e6, "max_num_seqs": 2}  # 1 a token
        result = dpkd(
            "cache-teacher", *flags(options(endpoint.url, toy_teacher, toy_data, tmp_path / "whole", **prices))
        )
        limit = 0.7 * cost_of(result.stderr)
        endpoint.bodies.clear()
        given = options(endpoint.url, toy_teacher, toy_data, out, **prices, max_cost=limit)
        codes = []
        while not codes or codes[-1] == 3:
            result = dpkd("cache-teacher", *flags(given))
            codes.append(result.returncode)
            assert len(codes) < 9, result.stderr
            assert 0 < cost_of(result.stderr) <= limit
            if codes[-1] == 3:
                assert "stopped: the budget does not cover another answer" in result.stderr.splitlines()[-1]
                assert not (out / "manifest.json").exists()
        assert codes[-1] == 0, result.stderr
        assert len(codes) > 1
        asked = [body for body in endpoint.bodies if body["max_tokens"] == NEW_TOKENS]
    assert len(asked) == 8  # no answer was paid for twice
    finished, reference = (TeacherCache.open(folder).manifest for folder in (out, tmp_path / "whole"))
    assert [shard.sha256 for shard in finished.shards] == [shard.sha256 for shard in reference.shards]
    assert {path.name for path in out.iterdir()} == {"manifest.json", "dpkd.toml", "shards"}


def no_logprobs(answer: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
    answer["choices"][0]["logprobs"] = None
    return answer


def test_an_endpoint_without_log_probs_gives_a_cache_of_texts(
    toy_teacher: Path, toy_student: Path, toy_data: Path, tmp_path: Path
) -> None:
    from dpkd.distill import TrainConfig, train

    out = tmp_path / "cache"
    with serving_toy(toy_teacher, change=no_logprobs) as (_, endpoint):
        given = options(endpoint.url, toy_teacher, toy_data, out, teacher_api="chat", max_new_tokens=40)
        with pytest.raises(UserError, match=r"returns no log-probs.*Give --top-k 0 to cache its texts for .* seqkd"):
            build_cache(CacheConfig(**given))
        manifest: Manifest = build_cache(CacheConfig(**given, top_k=0))
        # texts of the toy are random bytes, and not all of them are characters
        failed = {row["reason"] for row in manifest.failed}
        assert failed <= {"the tokenizer does not give the answer's text back"}
    assert manifest.identities["logprobs"] | {"mode": "none", "top_k": 0} == manifest.identities["logprobs"]
    verify_cache(out)
    rows = rows_of(out)
    assert rows
    assert all(len(row.response_logprobs) == 0 and row.distributions is None for row in rows)
    common = {"cache": str(out), "student": str(toy_student), "steps": 1, "batch_size": 2, "device": "cpu"}
    train(TrainConfig(**common, out=str(tmp_path / "seqkd"), objective="seqkd"))
    with pytest.raises(UserError, match=r"has no distributions, which --objective dpkd --level token needs"):
        train(TrainConfig(**common, out=str(tmp_path / "dpkd")))


def test_an_end_of_unknown_probability_needs_a_term_that_teaches_it(
    toy_teacher: Path, toy_student: Path, toy_data: Path, tmp_path: Path
) -> None:
    from dpkd.distill import TrainConfig, train

    with serving_toy(toy_teacher, most=8) as (_, endpoint):
        build_cache(CacheConfig(**options(endpoint.url, toy_teacher, toy_data, tmp_path / "cache")))
    common = {
        "cache": str(tmp_path / "cache"), "student": str(toy_student), "steps": 1, "batch_size": 2, "device": "cpu",
    }  # fmt: skip
    with pytest.raises(UserError, match=r"how likely the end of a response is.*Add --sft-weight 0.1"):
        train(TrainConfig(**common, out=str(tmp_path / "none")))
    # where nothing is known, all tokens would be equal and no token the likeliest
    for given, found in (({"objective": "forward-kl", "tail": "uniform"}, "tail uniform"),
                         ({"token_pairs": "argmax"}, "token-pairs argmax")):  # fmt: skip
        with pytest.raises(UserError, match=f"would unlearn the end: found --{found}"):
            train(TrainConfig(**common, **given, out=str(tmp_path / "none"), sft_weight=0.1))
    train(TrainConfig(**common, out=str(tmp_path / "run"), sft_weight=0.1))


def test_log_probs_after_the_temperature_are_refused(toy_teacher: Path, toy_data: Path, tmp_path: Path) -> None:
    with serving_toy(toy_teacher, processed=True) as (_, endpoint):
        with pytest.raises(UserError, match=r"log-probs after temperature and top-p.*Leave --temperature"):
            build_cache(CacheConfig(**options(endpoint.url, toy_teacher, toy_data, tmp_path / "a", temperature=0.5)))
        build_cache(CacheConfig(**options(endpoint.url, toy_teacher, toy_data, tmp_path / "b")))
    with serving_toy(toy_teacher) as (toy, endpoint):
        build_cache(CacheConfig(**options(endpoint.url, toy_teacher, toy_data, tmp_path / "c", temperature=0.5)))
        check_values(toy, rows_of(tmp_path / "c"), 5)


def test_the_key_comes_from_the_environment_and_stays_there(
    toy_teacher: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    out = tmp_path / "cache"

    def before(body: dict[str, Any]) -> Answer | None:
        repeats = body["max_tokens"] == NEW_TOKENS and endpoint.headers[-1]["authorization"] == f"Bearer {KEY}"
        return failure(400, f"bad key {KEY}") if repeats and body["seed"] % 2 else None

    with serving_toy(toy_teacher, before=before) as (_, endpoint):
        result = dpkd("cache-teacher", *flags(options(endpoint.url, toy_teacher, toy_data, out)))
        assert result.returncode == 3, result.stderr
        assert {headers["authorization"] for headers in endpoint.headers} == {f"Bearer {KEY}"}
    assert "bad key ***" in result.stderr
    assert KEY not in result.stdout + result.stderr
    assert all(KEY.encode() not in path.read_bytes() for path in out.rglob("*") if path.is_file())
    with pytest.raises(UserError, match=r"the key would be sent over plain http"):
        build_cache(CacheConfig(**options("http://elsewhere:1/v1", toy_teacher, toy_data, tmp_path / "other")))
    monkeypatch.delenv(KEY_VARIABLE)
    more = {"api_key_env": "ANOTHER"}
    with pytest.raises(UserError, match=r"the environment variable ANOTHER is not set"):
        build_cache(CacheConfig(**options("http://127.0.0.1:1/v1", toy_teacher, toy_data, tmp_path / "other", **more)))


def test_a_directory_with_a_tokenizer_alone_is_enough(
    toy_teacher: Path, toy_tokenizer: Path, toy_data: Path, tmp_path: Path
) -> None:
    assert not (toy_tokenizer / "config.json").exists()
    with serving_toy(toy_teacher) as (toy, endpoint):
        build_cache(CacheConfig(**options(endpoint.url, toy_tokenizer, toy_data, tmp_path / "cache")))
        check_values(toy, rows_of(tmp_path / "cache"), 5)
    cache, teacher = TeacherCache.open(tmp_path / "cache"), locate_model(str(toy_teacher), "teacher")
    with pytest.raises(UserError, match=r"nobody knows the weights of the cache's teacher"):
        cache.check_teacher(teacher, advice="")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"teacher_model": None}, "--engine openai needs --teacher-model"),
        ({"responses": "both"}, "answers prompts and scores nothing"),
        ({"teacher_api": "chat", "template": "alpaca"}, "give --template chat, not alpaca"),
        ({"max_cost": 1}, "--max-cost needs --price-in and --price-out"),
        ({"max_cost": 1, "price_out": 2}, "--max-cost needs --price-in and --price-out"),
        ({"dtype": "bfloat16"}, "--dtype is for models on this machine"),
        (
            {"engine": "transformers", "teacher_model": None, "teacher_url": None, "tries": 3},
            "goes with --engine openai",
        ),
        ({"ray_replicas": 2}, "--ray-replicas goes with --engine ray"),
        (
            {
                "engine": "server",
                "server_url": "http://host",
                "teacher_model": None,
                "teacher_url": None,
                "device": "cpu",
            },
            "--device is for models on this machine; --engine server takes none",
        ),
        ({"teacher_url": "http://user:pw@host/v1"}, "holds a user name or password"),
        ({"teacher_url": "ftp://host"}, "not an address of the form"),
    ],
)
def test_options_that_do_not_go_together(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = options("https://host/v1", tmp_path, tmp_path / "rows.jsonl", tmp_path / "cache") | more
    with pytest.raises(UserError, match=message):
        CacheConfig.parse({key: value for key, value in given.items() if value is not None}, where="a test")


def test_a_saved_config_has_no_key_and_asks_for_the_same(toy_teacher: Path, toy_data: Path, tmp_path: Path) -> None:
    with serving_toy(toy_teacher) as (_, endpoint):
        build_cache(CacheConfig(**options(endpoint.url, toy_teacher, toy_data, tmp_path / "cache")))
        result = dpkd("cache-teacher", "--config", tmp_path / "cache" / "dpkd.toml")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "cache" / "manifest.json").read_text())["identities"]["logprobs"]["top_k"] == 5


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_conversations_and_what_only_the_teacher_sees(
    api: str, toy_teacher: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    ask = [{"role": "user", "content": "One?"}, {"role": "user", "content": "Two?"}]
    hint = [{"role": "system", "content": "The answer is 7."}, {"role": "user", "content": "What?"}]
    talks, hints = (
        write_rows([{"messages": ask}], "talks.jsonl"),
        write_rows([{"messages": hint[1:], "teacher_messages": hint}], "hints.jsonl"),
    )
    with serving_toy(toy_teacher) as (toy, endpoint):
        more = {"teacher_api": api, "turns": "all"}
        build_cache(CacheConfig(**options(endpoint.url, toy_teacher, talks, tmp_path / "talks", **more)))
        first, second = rows_of(tmp_path / "talks")
        check_values(toy, [first, second], 5, chat=api == "chat")
        # the second question comes after the teacher's own answer to the first
        answer = toy.tokenizer.decode(first.response_ids, skip_special_tokens=True)
        turns = [ask[0], {"role": "assistant", "content": answer}, ask[1]]
        if api == "chat":
            assert endpoint.bodies[-1]["messages"] == turns
        else:
            assert endpoint.bodies[-1]["prompt"] == second.prompt_ids.tolist()
        build_cache(CacheConfig(**options(endpoint.url, toy_teacher, hints, tmp_path / "hints", teacher_api=api)))
        (row,) = rows_of(tmp_path / "hints")
        asked = row.asked_ids.tolist()
        assert asked == toy.tokenizer.apply_chat_template(hint, add_generation_prompt=True)["input_ids"]
        assert endpoint.bodies[-1].get("messages", asked) == (hint if api == "chat" else asked)
    verify_cache(tmp_path / "talks")
    verify_cache(tmp_path / "hints")


@pytest.fixture(scope="module")
def tool_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("tools"))[0]


@pytest.mark.parametrize(("with_ids", "reads_tools"), [(True, "always"), (True, "unless none"), (False, "always")])
def test_a_chat_gets_the_tools_of_a_row_and_its_calls(
    with_ids: bool, reads_tools: str, tool_teacher: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", conversations())
    with serving_toy(tool_teacher, with_ids=with_ids, reads_tools=reads_tools) as (toy, endpoint):
        more = {"teacher_api": "chat", "max_prompt_tokens": 400}
        manifest = build_cache(CacheConfig(**options(endpoint.url, tool_teacher, data, tmp_path / "cache", **more)))
        rows = rows_of(tmp_path / "cache")
        asked = [body for body in endpoint.bodies if body.get("max_tokens") == NEW_TOKENS and "tools" in body]
        # the model's values under the prompt with tools and calls, which are the student's: nothing was left out
        check_values(toy, rows, 5, chat=True)
        assert not manifest.failed
        as_text = with_ids and reads_tools == "always"
        facts = manifest.identities["generation"]["endpoint"]
        assert facts["tools"] == ("calls in the text" if as_text else "calls taken out")
        assert facts["prompt_tokens"] == "as the tokenizer"
    (body,) = asked
    assert (body["tools"], body.get("tool_choice")) == ([WEATHER], "none" if as_text else None)
    call, result = body["messages"][1:3]
    # the protocol's form: arguments as text, and an id that joins the call and its result
    assert call["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    ]
    assert result == {"role": "tool", "content": "22 degrees", "tool_call_id": "c1"}
    (row,) = (row for row in rows if row.example_id == "tools")
    assert "get_weather" in toy.tokenizer.decode(row.prompt_ids)


def test_an_endpoint_that_reads_no_tools_is_refused(tool_teacher: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", conversations())
    given = options("", tool_teacher, data, tmp_path / "cache", teacher_api="chat", max_prompt_tokens=400)
    with serving_toy(tool_teacher, reads_tools="never") as (_, endpoint):
        result = dpkd("cache-teacher", *flags(given | {"teacher_url": endpoint.url}))
        assert result.returncode == 2
        assert re.search(
            r"rows of the data have tools, and the endpoint does not read them: found \d+ prompt tokens with a tool, "
            r"expected more than the \d+ without.*--teacher-api completions",
            result.stderr,
        )
        assert not (tmp_path / "cache").exists()
        # rows without tools need none
        plain = write(tmp_path / "plain.jsonl", [row for row in conversations() if "tools" not in row])
        manifest = build_cache(CacheConfig(**given | {"teacher_url": endpoint.url, "data": str(plain)}))
    assert "tools" not in manifest.identities["generation"]["endpoint"]


@pytest.mark.parametrize("top_k", [0, 5])
def test_a_call_that_is_taken_out_of_the_answer_is_a_failed_row(top_k: int, tool_teacher: Path, tmp_path: Path) -> None:
    """Without its text it would be an empty answer: a student would learn to say nothing where the teacher calls."""

    def call(answer: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        if "tools" in body and body.get("max_tokens") == NEW_TOKENS:
            function = {"name": "get_weather", "arguments": "{}"}
            message = {"content": None, "tool_calls": [{"id": "x", "type": "function", "function": function}]}
            answer["choices"][0] |= {"message": message, "finish_reason": "stop"}
        return answer

    data = write(tmp_path / "rows.jsonl", conversations())
    with serving_toy(tool_teacher, change=call) as (_, endpoint):
        more = {"teacher_api": "chat", "top_k": top_k, "max_prompt_tokens": 400}
        manifest = build_cache(CacheConfig(**options(endpoint.url, tool_teacher, data, tmp_path / "cache", **more)))
    (failed,) = manifest.failed
    assert failed["example_id"] == "tools"
    assert failed["reason"] == "the endpoint took a tool call out of the answer, so its text is unknown"
    assert manifest.counts["rows"] == 3


def test_a_lost_shard_is_asked_for_again(toy_teacher: Path, toy_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    with serving_toy(toy_teacher) as (_, endpoint):
        before = build_cache(CacheConfig(**options(endpoint.url, toy_teacher, toy_data, out)))
        (out / before.shards[1].path).unlink()
        endpoint.bodies.clear()
        result = dpkd("cache", "repair", out)
        assert result.returncode == 0, result.stderr
        assert sum(body["max_tokens"] == NEW_TOKENS for body in endpoint.bodies) == 3
    assert [shard.sha256 for shard in TeacherCache.open(out).manifest.shards] == [
        shard.sha256 for shard in before.shards
    ]


def test_a_killed_job_pays_for_no_answer_twice(toy_teacher: Path, toy_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"

    def before(body: dict[str, Any]) -> None:
        time.sleep(0.3 if body["max_tokens"] == NEW_TOKENS else 0)

    with serving_toy(toy_teacher, before=before) as (_, endpoint):
        given = flags(options(endpoint.url, toy_teacher, toy_data, out, max_num_seqs=1, rows_per_shard=8))
        job, deadline_s = Command("cache-teacher", *given), time.monotonic() + 120
        while len(list(out.glob("answers/*.gz"))) < 4:
            assert job.poll() is None, job.stderr
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        job.kill()
        assert not list(out.glob("shards/*"))
        assert dpkd("cache-teacher", *given).returncode == 0
        asked = sum(body["max_tokens"] == NEW_TOKENS for body in endpoint.bodies)
    assert asked in (8, 9)  # the one in flight is lost
    assert len(rows_of(out)) == 8
    assert not (out / "answers").exists()
