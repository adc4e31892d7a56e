"""`dpkd cache repair`: one bad shard costs one shard, and the repaired cache is the one that was built in one go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.commands import dpkd
from support.conversations import conversations, make_models, write

from dpkd.core.errors import UserError
from dpkd.core.identity import canonical_json, fingerprint
from dpkd.core.models import locate_model
from dpkd.teacher_cache.audit.verify import verify_cache
from dpkd.teacher_cache.build import cache as cache_module
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.build.repair import repair_cache
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.folder import Folder
from dpkd.teacher_cache.store.folders import open_folder
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.reader import TeacherCache


def options(teacher: Path, data: Path, out: str, **others: object) -> CacheConfig:
    defaults: dict[str, object] = {
        "template": "chat", "engine": "transformers", "responses": "both", "rows_per_shard": 4, "max_new_tokens": 8,
        "top_k": 4, "device": "cpu", "limit": 10,
        "max_num_seqs": 1,  # the last bit of a log-prob depends on the batch
    }  # fmt: skip
    return CacheConfig(teacher=str(teacher), data=str(data), out=out, **(defaults | others))


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory, toy_teacher: Path, toy_student: Path, toy_data: Path
) -> tuple[Path, Path]:
    """A cache with the round r0, which scores the cache's responses too, and the data that it was built from."""
    folder = tmp_path_factory.mktemp("repair")
    data = folder / "train.jsonl"
    data.write_bytes(toy_data.read_bytes())
    build_cache(options(toy_teacher, data, str(folder / "cache")))
    of_round = {"student": str(toy_student), "round": "r0", "score_cached": True}
    build_cache(options(toy_teacher, data, str(folder / "cache"), **of_round))
    return folder / "cache", data


@pytest.fixture(params=["local", "s3"])
def whole(request: pytest.FixtureRequest, tmp_path: Path, built: tuple[Path, Path]) -> tuple[Folder, dict[str, bytes]]:
    """A copy of the cache, on a disk or in an object store, and its files."""
    if request.param == "local":
        folder = open_folder(shutil.copytree(built[0], tmp_path / "cache"))
    else:
        folder = open_folder(f"{request.getfixturevalue('s3')}/{tmp_path.name}")
        for path in built[0].rglob("*.*"):
            if path.is_file():
                folder.write(str(path.relative_to(built[0])), path.read_bytes())
    return folder, contents(folder)


def contents(folder: Folder) -> dict[str, bytes]:
    return folder.read_many(folder.sizes())


def damage(folder: Folder, name: str, how: str) -> None:
    data = folder.read(name)
    middle = len(data) // 2
    if how == "missing":
        folder.delete(name)
    else:
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        folder.write(name, {"cut": data[:middle], "emptied": b"", "flipped": flipped}[how])


def commits(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None] = lambda number: None) -> list[str]:
    """Paths of the shards that jobs commit from now on; `act` is called with their number before each commit."""
    paths: list[str] = []
    commit = Job.commit

    def commit_and_note(job: Job, data: bytes, record: object) -> None:
        act(len(paths))
        commit(job, data, record)  # type: ignore[arg-type]
        paths.append(job.folder.where(record.path))  # type: ignore[attr-defined]

    monkeypatch.setattr(Job, "commit", commit_and_note)
    return paths


@pytest.mark.parametrize("how", ["cut", "emptied", "flipped", "missing"])
def test_one_bad_shard_costs_one_shard(
    whole: tuple[Folder, dict[str, bytes]], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before = whole
    name = "shards/teacher-000001.parquet"
    damage(folder, name, how)
    with pytest.raises(UserError, match=rf"Run `dpkd cache repair .*{Path(str(folder)).name}`"):
        verify_cache(str(folder))
    made = commits(monkeypatch)
    done = dpkd("cache", "repair", folder)
    assert (done.returncode, done.stdout) == (0, f"{folder}: 1 of 12 shards repaired\n"), done.stderr
    assert made == [folder.where(name)]
    assert contents(folder) == before
    verify_cache(str(folder))


def test_bad_shards_of_cache_and_round_are_repaired(
    whole: tuple[Folder, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before = whole
    bad = ["shards/reference-000002.parquet", "rounds/r0/shards/teacher-000000.parquet"]
    damage(folder, bad[0], "flipped")
    damage(folder, bad[1], "missing")
    with pytest.raises(UserError, match=rf"Run `dpkd cache repair [^ ]*{Path(str(folder)).name}`"):
        TeacherCache.open(str(folder)).round("r0")
    made = commits(monkeypatch)
    repaired = repair_cache(str(folder))
    assert (repaired.shards, repaired.bad, repaired.different) == (12, 2, 0)
    stages = [f"rounds/r0/{stage}/shards/teacher-000000.parquet" for stage in ("sampled", "scored")]
    assert made == [folder.where(name) for name in (bad[0], *stages, bad[1])]
    assert contents(folder) == before


def test_a_sound_cache_starts_no_engine(
    whole: tuple[Folder, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before = whole
    monkeypatch.setattr(cache_module, "open_filler", None)
    done = dpkd("cache", "repair", folder)
    assert (done.returncode, done.stdout) == (0, f"{folder}: all 12 shards are sound: nothing to repair\n")
    assert contents(folder) == before


def test_a_killed_repair_is_never_called_complete_and_resumes(
    whole: tuple[Folder, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before = whole
    names = [f"shards/teacher-00000{number}.parquet" for number in range(3)]
    for name in names:
        damage(folder, name, "cut")

    def kill_before_the_last(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        commits(context, kill_before_the_last)
        with pytest.raises(KeyboardInterrupt):
            repair_cache(str(folder))
    with pytest.raises(UserError, match=r"teacher-000002.parquet.*dpkd cache repair"):
        TeacherCache.open(str(folder))
    assert len(folder.sizes("ledger")) == 2
    made = commits(monkeypatch)
    assert repair_cache(str(folder)).bad == 1  # the other two have the bytes of the manifest again
    assert made == [folder.where(names[2])]
    assert contents(folder) == before


def test_a_shard_with_other_bytes_gets_a_new_checksum_and_the_round_follows(
    whole: tuple[Folder, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose numbers depend on the batch: here the manifest is of another response."""
    folder, before = whole
    name = "shards/teacher-000000.parquet"
    manifest = json.loads(before["manifest.json"])
    shard = next(shard for shard in manifest["shards"] if shard["path"] == name)
    shard["sha256"], actual = "0" * 64, shard["sha256"]
    del manifest["manifest_sha256"]
    folder.write("manifest.json", canonical_json(manifest | {"manifest_sha256": fingerprint(manifest)}) + b"\n")
    made = commits(monkeypatch)
    done = dpkd("cache", "repair", folder)
    assert "2 of 12 shards repaired\n1 of them have other bytes" in done.stdout
    assert actual in folder.read("manifest.json").decode()
    assert folder.where(f"rounds/r0/{name}") in made  # it has log-probs of the cache's response
    assert contents(folder) == before


def test_other_data_models_or_options_are_refused(
    whole: tuple[Folder, dict[str, bytes]], built: tuple[Path, Path], toy_teacher: Path, toy_student: Path
) -> None:
    folder, before = whole
    name = "shards/teacher-000001.parquet"
    damage(folder, name, "emptied")
    data = built[1].read_bytes()
    toml = before["dpkd.toml"].decode()
    try:
        built[1].write_bytes(data[:-2] + b" }\n")
        with pytest.raises(UserError, match=r"cannot be made again from what is here now; differing: data\.sha256: "):
            repair_cache(str(folder))
    finally:
        built[1].write_bytes(data)
    for changed, message in (
        (toml.replace(str(toy_teacher), str(toy_student)), r"differing: teacher\."),
        (toml.replace("seed = 0", "seed = 1"), r"differing: generation\.seed: 0 -> 1"),
        ("speculative = true\n" + toml, "made by a newer dpkd: found the field speculative"),
        ("not TOML", r"the file of options is not TOML"),
    ):
        assert changed != toml
        folder.write("dpkd.toml", changed.encode())
        with pytest.raises(UserError, match=message):
            repair_cache(str(folder))
    folder.delete("dpkd.toml")
    with pytest.raises(UserError, match="the file of options is missing"):
        repair_cache(str(folder))
    assert folder.read(name) == b""
    assert folder.read("manifest.json") == before["manifest.json"]


def test_touched_options_are_a_warning_and_newer_fields_say_so(
    whole: tuple[Folder, dict[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, before = whole
    folder.write("dpkd.toml", before["dpkd.toml"] + b"# mine\n")
    TeacherCache.open(str(folder))
    assert "dpkd.toml is not as it was when the cache was built; its rows are not affected" in capsys.readouterr().err
    with pytest.raises(UserError, match="All rows are sound"):
        verify_cache(str(folder))
    damage(folder, "shards/teacher-000001.parquet", "cut")
    assert repair_cache(str(folder)).bad == 1

    for change in ("top", "shard"):
        manifest = json.loads(before["manifest.json"])
        del manifest["manifest_sha256"]
        (manifest if change == "top" else manifest["shards"][1])["signature"] = "x"
        folder.write("manifest.json", canonical_json(manifest | {"manifest_sha256": fingerprint(manifest)}) + b"\n")
        with pytest.raises(UserError, match="made by a newer dpkd: found the field signature"):
            TeacherCache.open(str(folder))


def test_options_that_earlier_versions_did_not_read_are_no_obstacle(
    tmp_path: Path, toy_teacher: Path, toy_student: Path, toy_data: Path
) -> None:
    """Sampling options of references are in the identity of the cache, and a round recorded `turns` as it was given."""
    out = str(tmp_path / "cache")
    cached = options(toy_teacher, toy_data, out, responses="reference", limit=5)
    build_cache(cached.model_copy(update={"temperature": 0.5, "seed": 3, "num_samples": 2}))
    of_round = {"student": str(toy_student), "round": "r0", "responses": "reference", "limit": 5}
    build_cache(options(toy_teacher, toy_data, out, **of_round, num_samples=2))
    folder = open_folder(out)
    toml = folder.read("rounds/r0/dpkd.toml")
    folder.write("rounds/r0/dpkd.toml", toml.replace(b'turns = "last"', b'turns = "all"'))
    before = contents(folder)
    bad = ["shards/reference-000001.parquet", "rounds/r0/shards/reference-000000.parquet"]
    for name in bad:
        damage(folder, name, "missing")
    repaired = repair_cache(out)
    assert (repaired.shards, repaired.bad, repaired.different) == (4, 2, 0)
    assert contents(folder) == before


def test_later_turns_follow_an_answer_that_is_drawn_otherwise(tmp_path: Path) -> None:
    """As on a GPU, whose answer may differ: here the manifest and the options are of another seed."""
    teacher, _ = make_models(tmp_path / "models")
    data = write(tmp_path / "data.jsonl", conversations())
    out = tmp_path / "cache"
    given = {"turns": "all", "rows_per_shard": 2, "max_new_tokens": 12, "max_prompt_tokens": 400, "limit": None}
    build_cache(options(teacher, data, str(out), **(given | {"responses": "teacher"})))
    folder = open_folder(out)
    before = contents(folder)
    manifest = json.loads(before["manifest.json"])
    manifest["identities"]["generation"]["seed"] = 7
    manifest["fingerprint"] = fingerprint(manifest["identities"])
    del manifest["manifest_sha256"]
    folder.write("manifest.json", canonical_json(manifest | {"manifest_sha256": fingerprint(manifest)}) + b"\n")
    folder.write("dpkd.toml", before["dpkd.toml"].replace(b"seed = 0", b"seed = 7"))
    open_turn = next(
        path for path in sorted(before) if path.startswith("shards/teacher-") and has(out, path, "open/turn-1")
    )
    folder.delete(open_turn)
    repaired = repair_cache(str(out))
    after = contents(folder)
    assert after[open_turn] != before[open_turn]
    cache = TeacherCache.open(out)
    rows = {
        row.example_id: row for shard in map(cache.read, cache.shards()) for row in map(shard.row, range(len(shard)))
    }
    tokenizer = locate_model(str(teacher), "teacher").tokenizer
    answer = tokenizer.decode(rows["open/turn-1"].response_ids, skip_special_tokens=True)
    assert f"assistant\n{answer}<|im_end|>" in tokenizer.decode(rows["open/turn-2"].prompt_ids)
    with pytest.raises(UserError, match="All rows are sound"):  # the options are not those that it was built with
        verify_cache(out)
    changed = [path for path in before if path.startswith("shards/") and before[path] != after[path]]
    assert len(changed) == repaired.bad == repaired.different == 2  # the answer, and the turn that has it in its prompt


def has(cache: Path, path: str, example_id: str) -> bool:
    return example_id in pq.read_table(cache / path)["example_id"].to_pylist()
