"""Complete caches: contents, errors, and detection of any change."""

from __future__ import annotations

import random
import shutil
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dpkd.core.errors import UserError
from dpkd.core.models import locate_model
from dpkd.teacher_cache.audit.info import describe_cache
from dpkd.teacher_cache.audit.verify import row_problems, verify_cache
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.engines import open as open_module
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.codec import MAX_ERROR_NATS
from dpkd.teacher_cache.store.folder import MANIFEST
from dpkd.teacher_cache.store.folders import open_folder
from dpkd.teacher_cache.store.manifest import Manifest, read_manifest
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.rows import CachedRow
from dpkd.teacher_cache.store.shards import ShardRecord


def config(out: Path, teacher: Path, data: Path, **options: object) -> CacheConfig:
    defaults: dict[str, object] = {
        "engine": "transformers",
        "template": "chat",
        "max_new_tokens": 8,
        "top_k": 8,
        "rows_per_shard": 3,
    }
    return CacheConfig(out=out, teacher=str(teacher), data=str(data), **(defaults | options))


def all_rows(cache: TeacherCache) -> list[CachedRow]:
    return [shard.row(i) for record in cache.shards() for shard in [cache.read(record)] for i in range(len(shard))]


def test_every_row_is_there_once_and_verifies(toy_cache: Path) -> None:
    cache = TeacherCache.open(toy_cache)
    rows = all_rows(cache)
    keys = [(row.origin, row.example_id, row.sample) for row in rows]
    assert len(keys) == len(set(keys)) == 40
    assert {row.origin for row in rows} == {"teacher", "reference"}
    assert verify_cache(toy_cache) == {"rows": 80, "shards": 16, "rounds": 1}


def test_cached_logprobs_are_the_models_own(toy_cache: Path, toy_teacher: Path) -> None:
    """Against the full logits of transformers, with the label shift written out again by hand."""
    model = locate_model(str(toy_teacher), "teacher").load("float32").eval()
    for row in all_rows(TeacherCache.open(toy_cache))[::7]:
        ids = torch.tensor([*row.prompt_ids.tolist(), *row.response_ids.tolist()])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids[None]).logits[0], dim=-1)
        for place, token in enumerate(row.response_ids.tolist()):
            at = logprobs[len(row.prompt_ids) - 1 + place]
            assert abs(float(at[token]) - float(row.response_logprobs[place])) < 1e-4
            assert row.distributions is not None
            kept = slice(16 * place, 16 * place + 16)
            entry_ids = torch.tensor(row.distributions.ids_E[kept].astype(np.int64))
            gap = at[entry_ids] - torch.tensor(row.distributions.logprobs_E[kept])
            assert float(gap.abs().max()) <= MAX_ERROR_NATS + 1e-4
            outside = 1 - float(at[entry_ids].exp().sum())
            assert abs(outside - float(np.exp(row.distributions.log_tail_T[place]))) < 1e-5


def test_responses_end_in_eos_exactly_when_they_stop(toy_cache: Path) -> None:
    for row in all_rows(TeacherCache.open(toy_cache)):
        assert (row.response_ids[-1] == 0) == (row.finish_reason == "stop")
        assert 0 not in row.response_ids[:-1]
        assert len(row.response_ids) <= 12


def test_a_round_has_the_rows_of_the_cache(toy_cache: Path, toy_student: Path) -> None:
    cache = TeacherCache.open(toy_cache)
    held = cache.round("r0")
    for record in cache.shards():
        ours, theirs = cache.read(record), cache.read_round(held, record)
        assert len(ours) == len(theirs)
        for i in range(len(ours)):
            assert ours.row(i).example_id == theirs.row(i).example_id
            assert ours.row(i).prompt_ids.tolist() == theirs.row(i).prompt_ids.tolist()
            assert theirs.row(i).origin == "student"
    assert held.manifest.identities["student"]["name"] == toy_student.name
    assert not (toy_cache / "rounds" / "r0" / "sampled").exists()


def test_any_parquet_reader_opens_a_shard(toy_cache: Path) -> None:
    table = pq.read_table(next((toy_cache / "shards").glob("teacher-*.parquet")))
    row = table.slice(0, 1).to_pylist()[0]
    # decoding by hand, as docs/cache-format.md says: a running sum of steps of 1/128 nat
    first = row["entry_logprob_steps"][: row["entry_counts"][0]]
    decoded = -np.cumsum(first) / 128
    assert decoded[0] <= 0
    assert (np.diff(decoded) <= 0).all()
    assert len(row["response_ids"]) == len(row["response_logprobs"]) == len(row["entry_counts"])


def test_results_do_not_depend_on_shards_or_neighbours(tmp_path: Path, toy_teacher: Path, toy_data: Path) -> None:
    build_cache(config(tmp_path / "a", toy_teacher, toy_data, limit=7))
    build_cache(config(tmp_path / "b", toy_teacher, toy_data, limit=7, rows_per_shard=50))
    build_cache(config(tmp_path / "c", toy_teacher, toy_data, limit=5))
    a, b, c = (all_rows(TeacherCache.open(tmp_path / name)) for name in "abc")
    for other in (b, c):
        for one, two in zip(a, other, strict=False):
            assert one.response_ids.tolist() == two.response_ids.tolist()
            assert np.allclose(one.response_logprobs, two.response_logprobs, atol=1e-4)


def test_the_same_options_give_the_same_bytes(tmp_path: Path, toy_teacher: Path, toy_data: Path) -> None:
    first = build_cache(config(tmp_path / "a", toy_teacher, toy_data, limit=7))
    again = build_cache(config(tmp_path / "b", toy_teacher, toy_data, limit=7))
    assert [shard.sha256 for shard in first.shards] == [shard.sha256 for shard in again.shards]
    assert first.fingerprint == again.fingerprint


def test_samples_and_temperatures(tmp_path: Path, toy_teacher: Path, toy_data: Path) -> None:
    build_cache(config(tmp_path / "a", toy_teacher, toy_data, limit=4, num_samples=3))
    rows = all_rows(TeacherCache.open(tmp_path / "a"))
    assert [row.sample for row in rows] == [0, 1, 2] * 4
    assert len({tuple(row.response_ids.tolist()) for row in rows[:3]}) > 1
    greedy = [
        build_cache(config(tmp_path / name, toy_teacher, toy_data, limit=4, temperature=0, seed=seed))
        for name, seed in (("b", 1), ("c", 2))
    ]
    assert [shard.sha256 for shard in greedy[0].shards] == [shard.sha256 for shard in greedy[1].shards]


def test_a_finished_cache_is_left_alone_and_other_options_are_refused(
    tmp_path: Path, toy_teacher: Path, toy_data: Path
) -> None:
    out = tmp_path / "a"
    build_cache(config(out, toy_teacher, toy_data, limit=4))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}
    build_cache(config(out, toy_teacher, toy_data, limit=4))
    with pytest.raises(UserError, match=r"differing: generation\.temperature: 1\.0 -> 0\.5"):
        build_cache(config(out, toy_teacher, toy_data, limit=4, temperature=0.5))
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()} == before


def test_left_out_rows_are_counted_and_listed(
    tmp_path: Path, toy_teacher: Path, write_rows: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    data = write_rows([{"instruction": "ok"}, {"instruction": ""}, {"instruction": "long " * 300}])
    manifest = build_cache(config(tmp_path / "a", toy_teacher, data))
    assert [row["line"] for row in manifest.skipped] == [2, 3]
    assert "2 rows of the data are skipped" in capfd.readouterr().err
    assert describe_cache(tmp_path / "a")["skipped"] == 2
    assert manifest.counts["rows"] == 1


def test_text_that_spells_control_tokens_is_text_and_counted(
    tmp_path: Path, toy_teacher: Path, write_rows: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"instruction": "Hi<|end|><|user|>Hello", "output": "So<|end|>"},
        {"instruction": "Hi", "output": "<|assistant|>"},
        {"instruction": "Hi", "output": "So"},
    ]
    manifest = build_cache(config(tmp_path / "a", toy_teacher, write_rows(rows), responses="reference", top_k=0))
    assert manifest.text == {"control_tokens_as_text": 2, "closing_eos_removed": 1}
    told = capfd.readouterr().err
    assert "2 rows spell control tokens, which are encoded as text" in told
    assert "1 rows end references with the text of EOS, which is removed" in told
    assert describe_cache(tmp_path / "a")["text"] == manifest.text
    spelled, _, plain = all_rows(TeacherCache.open(tmp_path / "a"))
    end, user, assistant = 0, 1, 2
    assert [token for token in spelled.prompt_ids if token < 3] == [user, end, assistant]
    assert spelled.response_ids.tolist() == plain.response_ids.tolist()
    # rows without such text leave no trace: the manifest is that of 0.1.0
    quiet = build_cache(config(tmp_path / "b", toy_teacher, write_rows(rows[2:]), responses="reference", top_k=0))
    assert b'"text"' not in quiet.to_bytes()
    assert read_manifest(open_folder(tmp_path / "b"), "teacher-cache").text == {}


def test_tokenizers_are_compared_by_what_they_do(
    tmp_path: Path, toy_teacher: Path, write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows([{"instruction": "Hi", "output": "So"}])
    options = config(tmp_path / "a", toy_teacher, data, responses="reference", top_k=0)
    build_cache(options)
    cache, model = TeacherCache.open(tmp_path / "a"), locate_model(str(toy_teacher), "student")
    cache.check_tokenizer(model, "student")
    monkeypatch.setattr(type(model), "tokenizer_probe", lambda self: "0" * 64)
    with pytest.raises(UserError, match="the student's tokenizer has the content of the cache's, and gives other ids"):
        cache.check_tokenizer(model, "student")
    with pytest.raises(UserError, match=r"differing: tokenizer\.probe"):
        build_cache(options)
    # a cache of 0.1.0, which has no probe
    manifest = read_manifest(open_folder(tmp_path / "a"), "teacher-cache")
    del manifest.identities["tokenizer"]["probe"]
    (tmp_path / "a" / "manifest.json").write_bytes(manifest.to_bytes())
    TeacherCache.open(tmp_path / "a").check_tokenizer(model, "student")
    assert build_cache(options).identities == manifest.identities


def test_nothing_usable_is_an_error_and_writes_nothing(
    tmp_path: Path, toy_teacher: Path, write_rows: Callable[..., Path]
) -> None:
    with pytest.raises(
        UserError, match="no row of the data can be used, 1 are skipped; line 1: `instruction` is empty"
    ):
        build_cache(config(tmp_path / "a", toy_teacher, write_rows([{"instruction": " "}])))
    assert not (tmp_path / "a").exists()


def test_references_are_scored_and_cut(tmp_path: Path, toy_teacher: Path, write_rows: Callable[..., Path]) -> None:
    rows = [
        {"instruction": "a", "output": ["b", "a much longer answer than eight tokens can hold, by far"]},
        {"instruction": "c"},
    ]
    manifest = build_cache(config(tmp_path / "a", toy_teacher, write_rows(rows), responses="reference"))
    cached = all_rows(TeacherCache.open(tmp_path / "a"))
    assert [(row.finish_reason, row.sample) for row in cached] == [("stop", 0), ("length", 1)]
    assert manifest.skipped == [{"line": 2, "reason": "no reference response"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 601}, "top-k is larger than the vocabulary: found 601, expected at most 600"),
        ({"teacher": "nowhere"}, "the teacher is not found: found no directory 'nowhere'"),
        ({"max_new_tokens": 300}, "are longer than the model's positions: found 556 tokens, expected at most 512"),
    ],
)
def test_bad_options_write_nothing(
    tmp_path: Path, toy_teacher: Path, toy_data: Path, options: dict[str, object], message: str
) -> None:
    values = config(tmp_path / "a", toy_teacher, toy_data).model_dump() | options
    with pytest.raises(UserError, match=message):
        build_cache(CacheConfig(**values))
    assert not (tmp_path / "a").exists()


def test_arguments_of_vllm_are_refused_where_auto_is_transformers(
    tmp_path: Path, toy_teacher: Path, toy_student: Path, toy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_module, "find_spec", lambda name: None)
    given = {"engine": "auto", "engine_arg": "quantization=fp8"}
    message = r"--engine-arg is for vLLM, which is not installed.*found quantization=fp8\. Leave --engine-arg out"
    with pytest.raises(UserError, match=message):
        build_cache(config(tmp_path / "a", toy_teacher, toy_data, **given))
    assert not (tmp_path / "a").exists()
    build_cache(config(tmp_path / "a", toy_teacher, toy_data, limit=2, engine="auto"))
    with pytest.raises(UserError, match=message):
        build_cache(
            CacheConfig(
                teacher=str(toy_teacher), student=str(toy_student), round="r0", out=str(tmp_path / "a"), **given
            )
        )
    assert not (tmp_path / "a" / "rounds").exists()


@pytest.mark.parametrize("option", [{"num_samples": 4}, {"temperature": 0.5}, {"top_p": 0.9}, {"seed": 3}])
def test_options_of_drawing_are_refused_where_nothing_is_drawn(option: dict[str, Any]) -> None:
    given = {"teacher": "t", "data": "d", "out": "o", "responses": "reference"}
    flag = CacheConfig.flag(next(iter(option)))
    with pytest.raises(UserError, match=f"{flag} goes with --responses teacher or both: references are given"):
        CacheConfig.parse(given | option, where="a test")
    for responses in ("teacher", "both"):
        CacheConfig.parse(given | option | {"responses": responses}, where="a test")


def test_a_round_on_references_is_drawn_as_asked(
    tmp_path: Path, toy_teacher: Path, toy_student: Path, toy_data: Path
) -> None:
    spelt_out = {"num_samples": 1, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    options = config(tmp_path / "a", toy_teacher, toy_data, limit=2, top_k=0, responses="reference", **spelt_out)
    build_cache(CacheConfig.parse(tomllib.loads(options.to_toml()), where="its dpkd.toml"))
    of_round = {"student": str(toy_student), "round": "r0", "engine": "transformers", "top_k": 0}
    drawn = {"temperature": 0.5, "seed": 3}
    build_cache(CacheConfig(teacher=str(toy_teacher), out=tmp_path / "a", **of_round, **drawn))
    saved = tomllib.loads((tmp_path / "a" / "rounds" / "r0" / "dpkd.toml").read_text())
    assert (saved["responses"], saved["temperature"], saved["seed"]) == ("reference", 0.5, 3)
    build_cache(CacheConfig.parse(saved, where="its dpkd.toml"))  # finished: nothing to do


def test_a_directory_of_other_things_is_refused(tmp_path: Path, toy_teacher: Path, toy_data: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"contains other files: found thesis\.tex"):
        build_cache(config(tmp_path, toy_teacher, toy_data))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_any_flipped_byte_is_found(cache_copy: Path) -> None:
    random.seed(7)
    files = sorted(path for path in cache_copy.rglob("*") if path.is_file())
    for _ in range(120):
        path = random.choice(files)
        data = path.read_bytes()
        place = random.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << random.randrange(8))]) + data[place + 1 :])
        with pytest.raises(UserError):
            verify_cache(cache_copy)
        path.write_bytes(data)
    verify_cache(cache_copy)


def test_ten_thousand_shards_are_opened_in_a_fifth_of_a_second(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    (tmp_path / "shards").mkdir()
    records = []
    for number in range(10_000):
        path = f"shards/teacher-{number:06d}.parquet"
        (tmp_path / path).write_bytes(b"x" * (number % 7))
        lengths = [0, 0, 1, 2, 3, 40, 50, 30, 2]
        records.append(
            ShardRecord(path, "teacher", f"{number:064x}", number % 7, 128, 25_000, 1_600_000, 2e4 / 3, 3, 512, lengths)
        )
    manifest = Manifest("teacher-cache", {}, records)
    folder.write(MANIFEST, manifest.to_bytes())
    taken_s = []
    for _ in range(5):
        started_s = time.process_time()  # other work on the machine does not count
        opened = TeacherCache.open(tmp_path)
        taken_s.append(time.process_time() - started_s)
    assert len(opened.manifest.shards) == 10_000
    assert opened.manifest.shards[-1].lengths == records[-1].lengths
    assert min(taken_s) < 0.2


def test_a_cut_or_missing_shard_is_found_at_opening(cache_copy: Path) -> None:
    shard = sorted((cache_copy / "shards").iterdir())[0]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"missing or incomplete: found {len(data) - 1} bytes, expected {len(data)}"):
        TeacherCache.open(cache_copy)
    shard.unlink()
    with pytest.raises(UserError, match="missing or incomplete: found no file"):
        TeacherCache.open(cache_copy)


def test_unfinished_absent_and_newer_caches_say_so(cache_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the cache directory is missing"):
        TeacherCache.open(tmp_path / "nowhere")
    manifest = cache_copy / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"format_version":1', b'"format_version":9'))
    with pytest.raises(UserError, match="made by a newer dpkd: found format version 9, expected at most 2"):
        TeacherCache.open(cache_copy)
    manifest.unlink()
    with pytest.raises(UserError, match="the directory is not a cache"):
        TeacherCache.open(cache_copy)
    (cache_copy / "job.json").write_text("{}")
    with pytest.raises(UserError, match="the cache is unfinished"):
        TeacherCache.open(cache_copy)


def test_rounds_are_refused_by_name_teacher_and_tokenizer(
    cache_copy: Path, toy_teacher: Path, toy_student: Path, other_student: Path
) -> None:
    with pytest.raises(UserError, match="no such round: found 'r9', expected 'r0'"):
        TeacherCache.open(cache_copy).round("r9")
    options = {"out": cache_copy, "engine": "transformers", "round": "r1", "max_new_tokens": 8, "top_k": 4}
    with pytest.raises(UserError, match=r"the teacher is not the one of the cache: found weights_sha256"):
        build_cache(CacheConfig(teacher=str(toy_student), student=str(toy_student), **options))
    with pytest.raises(UserError, match="the student's tokenizer is not the cache's"):
        build_cache(CacheConfig(teacher=str(toy_teacher), student=str(other_student), **options))
    assert TeacherCache.open(cache_copy).round_names == ["r0"]


def test_a_round_takes_the_caches_options(
    cache_copy: Path, toy_teacher: Path, toy_student: Path, toy_data: Path, write_rows: Callable[..., Path]
) -> None:
    options = {
        "teacher": str(toy_teacher),
        "student": str(toy_student),
        "out": cache_copy,
        "engine": "transformers",
        "round": "r1",
        "max_new_tokens": 5,
        "top_k": 4,
    }
    with pytest.raises(UserError, match="the data is not that of the cache"):
        build_cache(CacheConfig(**options, data=str(write_rows([{"instruction": "other"}]))))
    with pytest.raises(UserError, match="a round uses the template of its cache: found raw, expected chat"):
        build_cache(CacheConfig(**options, template="raw"))
    build_cache(CacheConfig(**options, data=str(toy_data)))
    assert 'template = "chat"' in (cache_copy / "rounds" / "r1" / "dpkd.toml").read_text()
    assert TeacherCache.open(cache_copy).round_names == ["r0", "r1"]


def test_a_round_of_another_cache_is_refused(
    cache_copy: Path, tmp_path: Path, toy_teacher: Path, toy_data: Path
) -> None:
    build_cache(config(tmp_path / "a", toy_teacher, toy_data, limit=4))
    shutil.copytree(cache_copy / "rounds", tmp_path / "a" / "rounds")
    with pytest.raises(UserError, match="the round belongs to another cache"):
        TeacherCache.open(tmp_path / "a").round("r0")


def test_row_problems_names_each_fault(toy_cache: Path) -> None:
    from dataclasses import replace

    cache = TeacherCache.open(toy_cache)
    row = cache.read(cache.shards()[0]).row(0)
    assert list(row_problems(row, cache.vocab_size)) == []
    assert row.distributions is not None
    top = row.distributions
    faults = {
        "outside the vocabulary": replace(row, response_ids=row.response_ids + 600),
        "have 0 log-probs": replace(row, response_logprobs=row.response_logprobs[:0]),
        "not a finite number": replace(row, response_logprobs=row.response_logprobs * np.nan),
        "rank order": replace(row, distributions=replace(top, logprobs_E=top.logprobs_E[::-1].copy())),
        "have more mass than 1": replace(row, distributions=replace(top, logprobs_E=top.logprobs_E * 0)),
        "do not add up": replace(row, distributions=replace(top, ids_E=top.ids_E[1:])),
        "tail mass": replace(row, distributions=replace(top, log_tail_T=top.log_tail_T * 0 + 1)),
    }
    for message, faulty in faults.items():
        assert any(message in problem for problem in row_problems(faulty, cache.vocab_size)), message


def test_reading_by_path_alone_needs_no_teacher(cache_copy: Path) -> None:
    manifest = read_manifest(open_folder(cache_copy), "teacher-cache")
    assert manifest.identities["teacher"]["vocab_size"] == 600
    assert manifest.identities["logprobs"] == {
        "mode": "raw_logprobs",
        "temperature": 1.0,
        "unit": "nats",
        "top_k": 16,
        "entry_grid_nats": 1 / 128,
    }
    assert manifest.identities["generation"]["stop_token_ids"] == [0]
