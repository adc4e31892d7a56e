"""Caches made from others: rows, bytes, lineage, crashes, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from support.commands import dpkd
from support.conversations import conversations, make_models, write
from support.toys import make_toy
from transformers import AutoTokenizer

from dpkd.core.errors import UserError
from dpkd.core.models import locate_model
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.training import train
from dpkd.teacher_cache.audit.info import describe_cache
from dpkd.teacher_cache.audit.verify import verify_cache
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.build.derived.filtering import filter_cache
from dpkd.teacher_cache.build.derived.merging import merge_caches
from dpkd.teacher_cache.build.repair import repair_cache
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.options.derive import CacheFilterConfig, CacheMergeConfig
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.tables import mean_logprobs

OPTIONS: dict[str, Any] = {
    "engine": "transformers", "template": "chat", "max_new_tokens": 24, "top_k": 16, "rows_per_shard": 6,
    "device": "cpu", "max_num_seqs": 1,  # one row a batch: a row's numbers do not depend on the others
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, toy_teacher: Path, toy_data: Path) -> dict[str, Path]:
    """A cache of all toy rows (`whole`), and caches of the first thirteen (`first`) and of the others (`second`)."""
    folder = tmp_path_factory.mktemp("parts")
    found = [json.loads(line) for line in toy_data.read_text(encoding="utf-8").splitlines()]
    # references of one word to seven, so that some end and others are cut
    short = [row | {"output": " ".join(row["output"].split()[: 1 + i % 7])} for i, row in enumerate(found)]
    lines = [json.dumps(row) for row in short]
    for name, own in (("whole", lines), ("first", lines[:13]), ("second", lines[13:])):
        (folder / f"{name}.jsonl").write_text("\n".join(own) + "\n", encoding="utf-8")
        data = {"teacher": str(toy_teacher), "data": str(folder / f"{name}.jsonl"), "responses": "both"}
        build_cache(CacheConfig(out=str(folder / name), **data, **OPTIONS))
    return {name: folder / name for name in ("whole", "first", "second")}


def filtered(cache: Path, out: Path, **rules: Any) -> TeacherCache:
    filter_cache(CacheFilterConfig(cache=str(cache), out=str(out), **rules))
    verify_cache(out)
    return TeacherCache.open(out)


def merged(caches: list[Path], out: Path, **options: Any) -> TeacherCache:
    merge_caches(CacheMergeConfig(caches=tuple(map(str, caches)), out=str(out), **options))
    verify_cache(out)
    return TeacherCache.open(out)


def shards(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((cache / "shards").iterdir())}


def rows(cache: Path) -> list[dict[str, Any]]:
    """Every row of the shards, as pyarrow reads them."""
    return [row for path in sorted((cache / "shards").iterdir()) for row in pq.read_table(path).to_pylist()]


def keys(cache: Path) -> list[tuple[str, str, int]]:
    return [(row["origin"], row["example_id"], row["sample"]) for row in rows(cache)]


# merge


def test_a_merged_cache_is_the_cache_of_the_union(tmp_path: Path, parts: dict[str, Path], toy_student: Path) -> None:
    """Byte for byte, since neither has a row that depends on others; so a student trained on it is the same too."""
    both = merged([parts["first"], parts["second"]], tmp_path / "both")
    assert shards(tmp_path / "both") == shards(parts["whole"])
    assert both.manifest.counts == TeacherCache.open(parts["whole"]).manifest.counts
    students = []
    for cache in (tmp_path / "both", parts["whole"]):
        run = train(
            TrainConfig(
                out=tmp_path / f"run-{cache.name}", cache=str(cache), student=str(toy_student), steps=4, batch_size=6,
                learning_rate=1e-3, device="cpu", tracker="none", validation_examples=4,
            )
        )  # fmt: skip
        students.append(load_file(run / "model.safetensors"))
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[1])


def test_the_lineage_names_the_parents(tmp_path: Path, parts: dict[str, Path]) -> None:
    both = merged([parts["first"], parts["second"]], tmp_path / "both")
    ours = [TeacherCache.open(parts[name]) for name in ("first", "second")]
    lineage = both.identities["lineage"]
    assert lineage["operation"] == "merge"
    assert [parent["fingerprint"] for parent in lineage["parents"]] == [cache.fingerprint for cache in ours]
    assert [parent["rows"] for parent in lineage["parents"]] == [
        {"reference": 13, "teacher": 13}, {"reference": 7, "teacher": 7},
    ]  # fmt: skip
    assert lineage["parents"][0]["identities"] == ours[0].identities
    for key in ("teacher", "tokenizer", "template", "generation", "logprobs"):
        assert both.identities[key] == ours[0].identities[key]
    assert both.identities["data"]["name"] == "first.jsonl + second.jsonl"
    assert both.fingerprint not in {cache.fingerprint for cache in ours}
    other_way = merged([parts["second"], parts["first"]], tmp_path / "other-way")
    assert other_way.fingerprint != both.fingerprint
    assert sorted(keys(tmp_path / "other-way")) == sorted(keys(tmp_path / "both"))
    facts = describe_cache(tmp_path / "both", 0)
    assert facts["identities"]["lineage"] == lineage


def test_equal_keys_are_refused_renumbered_or_renamed(tmp_path: Path, parts: dict[str, Path]) -> None:
    part = filtered(parts["whole"], tmp_path / "part", where=("origin == teacher",), min_tokens=3)
    num = part.manifest.counts["rows"]
    both = [parts["whole"], tmp_path / "part"]
    with pytest.raises(UserError, match=rf"{num} rows of one cache have the example id and sample .*, sample 0, in"):
        merged(both, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    whole_keys, part_keys = keys(parts["whole"]), keys(tmp_path / "part")
    merged(both, tmp_path / "renumbered", duplicates="renumber")
    assert sorted(keys(tmp_path / "renumbered")) == sorted(
        [*whole_keys, *((origin, example_id, sample + 1) for origin, example_id, sample in part_keys)]
    )
    merged(both, tmp_path / "renamed", duplicates="rename")
    assert sorted(keys(tmp_path / "renamed")) == sorted(
        (origin, f"{name}/{example_id}", sample)
        for name, found in (("whole", whole_keys), ("part", part_keys))
        for origin, example_id, sample in found
    )


def test_samples_are_numbered_on_for_each_origin(tmp_path: Path, parts: dict[str, Path], toy_teacher: Path) -> None:
    """Three responses of the teacher to a prompt, and one reference: the next ones are number 3 and number 1."""
    data = f"{parts['second']}.jsonl"
    many = {"teacher": str(toy_teacher), "data": data, "responses": "both", "num_samples": 3, "seed": 5}
    build_cache(CacheConfig(out=str(tmp_path / "many"), **OPTIONS | many))
    both = merged([tmp_path / "many", parts["second"]], tmp_path / "both", duplicates="renumber")
    found = keys(tmp_path / "both")
    assert len(set(found)) == len(found) == 7 * 4 + 14
    by_example: dict[tuple[str, str], list[int]] = {}
    for origin, example_id, sample in found:
        by_example.setdefault((origin, example_id), []).append(sample)
    assert {origin: sorted(samples) for (origin, _), samples in by_example.items()} == {
        "teacher": [0, 1, 2, 3], "reference": [0, 1],
    }  # fmt: skip
    assert both.identities["generation"]["num_samples"] == 3


def test_ids_that_mean_other_examples_are_not_renumbered(
    tmp_path: Path, toy_teacher: Path, write_rows: Callable[..., Path]
) -> None:
    caches = []
    for name, instruction in (("a", "Name a colour."), ("b", "Name a fruit.")):
        data = write_rows([{"instruction": instruction, "output": "Red."}], f"{name}.jsonl")
        build_cache(CacheConfig(teacher=str(toy_teacher), data=str(data), out=str(tmp_path / name), **OPTIONS))
        caches.append(tmp_path / name)
    with pytest.raises(UserError, match=r"same example id for different prompts.*found line-00000001.*rename"):
        merged(caches, tmp_path / "both", duplicates="renumber")
    merged(caches, tmp_path / "both", duplicates="rename")
    assert [row["example_id"] for row in rows(tmp_path / "both")] == ["a/line-00000001", "b/line-00000001"]


def test_several_teachers_in_one_cache(
    tmp_path: Path, parts: dict[str, Path], toy_tokenizer: Path, toy_teacher: Path, toy_student: Path
) -> None:
    """Rows of both are kept and trained on; what needs the one teacher is refused; parents' limits hold for both."""
    other = make_toy(tmp_path / "other-teacher", toy_tokenizer, layers=2, seed=9)
    (other / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    changed = OPTIONS | {"top_k": 8, "max_new_tokens": 30, "temperature": 0.7}
    data = f"{parts['second']}.jsonl"
    build_cache(CacheConfig(teacher=str(other), data=data, out=str(tmp_path / "other"), **changed))
    both = merged([parts["first"], tmp_path / "other"], tmp_path / "both")
    assert [teacher["weights_sha256"] for teacher in both.teachers] == [
        TeacherCache.open(path).identities["teacher"]["weights_sha256"] for path in (parts["first"], tmp_path / "other")
    ]
    assert both.top_k == 16
    assert both.identities["generation"]["max_new_tokens"] == 30
    assert both.identities["generation"]["temperature"] is None
    assert both.identities["generation"]["stop_token_ids"] is None
    stranger = Path(shutil.copytree(toy_student, tmp_path / "stranger"))
    tokenizer = AutoTokenizer.from_pretrained(toy_student)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(stranger)
    with pytest.raises(UserError, match="the student's tokenizer is not the cache's"):
        both.check_tokenizer(locate_model(str(stranger), "student"), "student")
    run = train(
        TrainConfig(
            out=tmp_path / "run", cache=str(tmp_path / "both"), student=str(toy_student), steps=2, batch_size=6,
            device="cpu", tracker="none", validation_examples=3,
        )
    )  # fmt: skip
    cache = tmp_path / "both"
    assert "toy-teacher + other-teacher" in (run / "README.md").read_text()
    for arguments in (
        ("cache-teacher", "--teacher", toy_teacher, "--out", cache, "--student", toy_student, "--round", "r0"),
        ("cache", "fidelity", "--cache", cache, "--teacher", toy_teacher, "--engine", "transformers"),
        (
            *("train", "--cache", cache, "--student", toy_student, "--out", tmp_path / "live", "--device", "cpu"),
            *("--level", "sequence", "--student-samples", "live", "--teacher-url", "http://127.0.0.1:1"),
        ),
    ):
        said = dpkd(*arguments)
        assert said.returncode == 2, said.stderr
        assert "the rows of the cache have several teachers" in said.stderr


def test_a_round_on_a_merged_cache(
    tmp_path: Path, parts: dict[str, Path], toy_teacher: Path, toy_student: Path
) -> None:
    """One teacher: a round is as on any cache. Parents that differ in their temperature: it must be given."""
    merged([parts["first"], parts["second"]], tmp_path / "both")
    options = {"teacher": str(toy_teacher), "student": str(toy_student), "round": "r0", **OPTIONS}
    build_cache(CacheConfig(out=str(tmp_path / "both"), **options))
    assert verify_cache(tmp_path / "both")["rounds"] == 1
    data = f"{parts['second']}.jsonl"
    warm = OPTIONS | {"temperature": 0.5}
    build_cache(CacheConfig(teacher=str(toy_teacher), data=data, out=str(tmp_path / "warm"), **warm))
    merged([parts["first"], tmp_path / "warm"], tmp_path / "mixed")
    with pytest.raises(UserError, match=r"merged from caches that differ in their temperature.* Give --temperature"):
        build_cache(CacheConfig(out=str(tmp_path / "mixed"), **options))
    build_cache(CacheConfig(out=str(tmp_path / "mixed"), temperature=1.0, **options))


def test_caches_that_cannot_be_merged(
    tmp_path: Path, parts: dict[str, Path], other_student: Path, toy_teacher: Path, toy_data: Path
) -> None:
    def build(name: str, **changed: Any) -> Path:
        made = {"teacher": str(toy_teacher), "data": str(toy_data), "limit": 1, **OPTIONS, **changed}
        build_cache(CacheConfig(out=str(tmp_path / name), **made))
        return tmp_path / name

    for name, changed, message in (
        ("tokenizer", {"teacher": str(other_student)}, "differ in their tokenizer: found [0-9a-f]{12} of .*, expected"),
        ("template", {"template": "raw"}, "differ in their template: found [0-9a-f]{12} of .*, expected"),
        (
            "no-top-k",
            {"top_k": 0},
            "differ in their kept columns: found no distributions of .*, expected distributions",
        ),
    ):
        with pytest.raises(UserError, match=message) as caught:
            merged([parts["first"], build(name, **changed)], tmp_path / "out")
        assert "\n" not in str(caught.value)
    copy = shutil.copytree(parts["first"], tmp_path / "copy")
    with pytest.raises(UserError, match="two of the caches have the same rows"):
        merged([parts["first"], copy], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# filter


def test_a_filtered_cache_is_the_cache_of_those_rows(tmp_path: Path, parts: dict[str, Path]) -> None:
    """The rows of `first` by their ids: byte for byte the cache that was built from them alone."""
    ids = ",".join(dict.fromkeys(row["example_id"] for row in rows(parts["first"])))
    kept = filtered(parts["whole"], tmp_path / "kept", where=(f"example_id in {ids}",))
    assert shards(tmp_path / "kept") == shards(parts["first"])
    lineage = kept.identities["lineage"]
    assert lineage["filter"] == {"where": [f"example_id in {ids}"]}
    assert lineage["parents"][0]["fingerprint"] == TeacherCache.open(parts["whole"]).fingerprint
    assert kept.identities["teacher"] == TeacherCache.open(parts["whole"]).identities["teacher"]


RULES: list[tuple[dict[str, Any], Callable[[dict[str, Any]], bool]]] = [
    ({"min_tokens": 12}, lambda row: len(row["response_ids"]) >= 12),
    ({"max_tokens": 20}, lambda row: len(row["response_ids"]) <= 20),
    ({"finish_reason": "length"}, lambda row: row["finish_reason"] == "length"),
    ({"min_logprob": -6.5}, lambda row: sum(row["response_logprobs"]) / len(row["response_logprobs"]) >= -6.5),
    ({"where": "origin == reference"}, lambda row: row["origin"] == "reference"),
    ({"where": ("origin != 'reference'", "sample < 1")}, lambda row: row["origin"] == "teacher"),
    ({"where": "response contains the"}, lambda row: "the" in row["response"]),
    ({"where": 'prompt >= "<|user|>H"'}, lambda row: row["prompt"] >= "<|user|>H"),
    (
        {"min_tokens": 9, "where": "finish_reason in stop,x"},
        lambda row: len(row["response_ids"]) >= 9 and row["finish_reason"] == "stop",
    ),
]


@pytest.mark.parametrize(("rules", "meets"), RULES, ids=[str(rules) for rules, _ in RULES])
def test_exactly_the_rows_that_meet_the_rules_stay(
    tmp_path: Path, parts: dict[str, Path], rules: dict[str, Any], meets: Callable[[dict[str, Any]], bool]
) -> None:
    every = rows(parts["whole"])
    expected = [row for row in every if meets(row)]
    assert 0 < len(expected) < len(every)
    filtered(parts["whole"], tmp_path / "kept", **rules)
    assert rows(tmp_path / "kept") == expected


def test_an_unknown_end_is_not_in_the_mean() -> None:
    """By hand: -3, -1 and an EOS of unknown log-prob, stored as 0; one that was cut; a known EOS; an EOS alone."""
    logprobs = [[-3.0, -1.0, 0.0], [-3.0, -1.0], [-3.0, -1.0, -2.0], [0.0], [-1.0, 0.0]]
    reasons = ["stop", "length", "stop", "stop", "length"]
    table = pa.table({"response_logprobs": logprobs, "finish_reason": reasons})
    assert mean_logprobs(table, ends_known=False).tolist() == [-2, -2, -2, 0, -0.5]
    assert mean_logprobs(table.drop_columns("finish_reason"), ends_known=True).tolist() == [-4 / 3, -2, -2, 0, -0.5]


def test_it_says_why_rows_went(tmp_path: Path, parts: dict[str, Path]) -> None:
    every = rows(parts["whole"])
    short = [row for row in every if len(row["response_ids"]) < 12]
    cut = [row for row in every if len(row["response_ids"]) >= 12 and row["finish_reason"] == "length"]
    said = dpkd(
        "cache", "filter", parts["whole"], "--out", tmp_path / "kept", "--min-tokens", 12, "--finish-reason", "stop"
    )
    left = len(every) - len(short) - len(cut)
    assert (said.returncode == 0) == (left > 0)
    assert f"{left} of 40 rows of {parts['whole']} remain" in said.stderr
    assert f"{len(short)} removed by --min-tokens 12" in said.stderr
    assert f"{len(cut)} removed by --finish-reason stop" in said.stderr


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"where": ("colour == red",)},
            "the cache has no such column: found colour, expected one of example_id, sample",
        ),
        ({"where": ("exampel_id == a",)}, "Did you mean example_id"),
        ({"where": ("entry_ids == 3",)}, "the column is a list, which has no order: found entry_ids"),
        ({"where": ("sample > many",)}, "the value does not fit the column: found many, expected int32"),
        ({"where": ("sample contains 1",)}, "only text contains something: found sample of type int32"),
        ({"where": ("origin",)}, '--where takes "COLUMN OP VALUE" such as "origin == teacher", found \'origin\''),
        ({"min_tokens": 9, "max_tokens": 3}, "--min-tokens 9 is more than --max-tokens 3"),
        ({}, "nothing to filter by"),
        ({"min_tokens": 9999}, "no row is left for the new cache.*nothing was written"),
        ({"min_logprob": 1}, "must be 0 or less"),
    ],
)
def test_filters_that_cannot_be(tmp_path: Path, parts: dict[str, Path], rules: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        filter_cache(
            CacheFilterConfig.parse({"cache": str(parts["whole"]), "out": str(tmp_path / "out"), **rules}, where="here")
        )
    assert not (tmp_path / "out").exists()


def test_every_command_reads_the_new_caches(
    tmp_path: Path, parts: dict[str, Path], toy_teacher: Path, toy_student: Path
) -> None:
    merged([parts["first"], parts["second"]], tmp_path / "both")
    kept = tmp_path / "kept"
    said = dpkd("cache", "filter", tmp_path / "both", "--out", kept, "--where", "origin == teacher")
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip() == str(kept)
    for arguments, found in (
        (("cache", "verify", kept), "sound: 20 rows"),
        (("cache", "info", kept), "operation: filter"),
        (("cache", "fidelity", "--cache", kept, "--teacher", toy_teacher, "--limit", 4), "cached"),
        (("init-student", "--teacher", toy_teacher, "--cache", kept, "--layers", 1, "--out", tmp_path / "s"), ""),
        (
            (
                *("eval", "--model", f"m={toy_student}", "--data", f"d={parts['second']}.jsonl", "--cache", kept),
                *("--out", tmp_path / "report", "--template", "chat", "--max-new-tokens", 4, "--seeds", 10),
                *("--engine", "transformers"),
            ),
            "report:",
        ),
    ):
        said = dpkd(*arguments)
        assert said.returncode == 0, said.stderr
        assert found in said.stdout
    assert "7 prompts are also in the cache" in said.stderr


def test_conversations_keep_their_spans_and_turns(tmp_path: Path) -> None:
    teacher, _ = make_models(tmp_path)
    data = write(tmp_path / "data.jsonl", conversations())
    options = OPTIONS | {"turns": "all", "rows_per_shard": 2, "max_prompt_tokens": 400, "max_new_tokens": 12}
    for name, responses in (("spans", "reference"), ("turns", "teacher")):
        made = options | {"responses": responses, "teacher": str(teacher), "data": str(data)}
        build_cache(CacheConfig(out=str(tmp_path / name), **made))
    kept = filtered(tmp_path / "spans", tmp_path / "some-spans", where="example_id != one")
    assert kept.has_spans
    assert kept.manifest.format_version == 2
    assert rows(tmp_path / "some-spans") == [row for row in rows(tmp_path / "spans") if row["example_id"] != "one"]
    kept = filtered(tmp_path / "turns", tmp_path / "some-turns", where="example_id contains t")
    whole = TeacherCache.open(tmp_path / "turns")
    assert kept.stems == whole.stems == ["teacher", "teacher_turn2", "teacher_turn3"]
    every = {row["example_id"] for row in rows(tmp_path / "turns")}
    assert {row["example_id"] for row in rows(tmp_path / "some-turns")} == {name for name in every if "t" in name}
    with pytest.raises(
        UserError, match=r"differ in their kept columns: found distributions of .*expected distributions, spans"
    ):
        merged([tmp_path / "spans", tmp_path / "turns"], tmp_path / "both")


def test_caches_in_an_object_store(tmp_path: Path, parts: dict[str, Path]) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(parts["first"]), "/derived/first", recursive=True)
    try:
        filter_cache(CacheFilterConfig(cache="memory://derived/first", out="memory://derived/kept", max_tokens=20))
        local = filtered(parts["first"], tmp_path / "kept", max_tokens=20)
        remote = TeacherCache.open("memory://derived/kept")
        assert remote.fingerprint == local.fingerprint
        assert remote.manifest.shards == local.manifest.shards
    finally:
        memory.rm("/derived", recursive=True)


# crashes


class Killed(BaseException):
    """Ends a job at once, as a kill does."""


@pytest.mark.parametrize("command", ["merge", "filter"])
def test_a_killed_job_resumes_to_the_same_bytes(
    tmp_path: Path, parts: dict[str, Path], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: Path) -> None:
        if command == "merge":
            merged([parts["first"], parts["second"]], out)
        else:
            filtered(parts["whole"], out, max_tokens=20)

    run(tmp_path / "whole")
    commit = Job.commit
    written: list[str] = []

    def killed(self: Job, data: bytes, record: Any) -> None:
        commit(self, data, record)
        written.append(record.path)
        raise Killed

    for number in range(1, len(shards(tmp_path / "whole")) + 1):
        monkeypatch.setattr(Job, "commit", killed)
        with pytest.raises(Killed):
            run(tmp_path / "out")
        assert len(written) == number
        assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.setattr(Job, "commit", commit)
    run(tmp_path / "out")
    assert len(set(written)) == len(written)  # nothing was made twice
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    manifests = [json.loads((tmp_path / name / "manifest.json").read_bytes()) for name in ("out", "whole")]
    assert manifests[0]["shards"] == manifests[1]["shards"]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"dpkd.toml", "manifest.json", "shards"}
    run(tmp_path / "out")  # finished: left as it is


@pytest.mark.parametrize("command", ["merge", "filter"])
def test_a_bad_shard_is_made_again_from_the_parents(tmp_path: Path, parts: dict[str, Path], command: str) -> None:
    out = tmp_path / "out"
    if command == "merge":
        merged([parts["first"], parts["second"]], out)
    else:
        filtered(parts["whole"], out, max_tokens=20)
    whole = shards(out)
    lost = out / "shards" / sorted(whole)[1]
    lost.unlink()
    repaired = repair_cache(str(out))
    assert (repaired.bad, repaired.different) == (1, 0)
    assert shards(out) == whole
    verify_cache(out)


def test_a_parent_that_is_corrupt_is_named(tmp_path: Path, parts: dict[str, Path]) -> None:
    parent = Path(shutil.copytree(parts["first"], tmp_path / "parent"))
    shard = sorted((parent / "shards").iterdir())[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    for act in (
        lambda: filtered(parent, tmp_path / "out", min_tokens=1),
        lambda: merged([parent, parts["second"]], tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=rf"checksum mismatch.*{re.escape(shard.name)}"):
            act()
    assert not (tmp_path / "out").exists()
