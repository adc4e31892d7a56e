"""Models of a hub get commits that change no number: jobs resume after those, and refuse others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.hub import Hub

from dpkd.core.errors import UserError
from dpkd.distill.options.student import InitStudentConfig
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.student.init import init_student
from dpkd.distill.training import train
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.build.repair import repair_cache
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.growing import GrowingCache
from dpkd.teacher_cache.store.job import Job

NAME = "toys/model"


def cache_config(out: Path, data: Path, **options: Any) -> CacheConfig:
    defaults = {"template": "chat", "max_new_tokens": 6, "top_k": 4, "rows_per_shard": 8, "max_num_seqs": 1}
    return CacheConfig(
        teacher=NAME, data=str(data), out=str(out), engine="transformers", device="cpu", **(defaults | options)
    )


def train_config(out: Path, cache: Path, student: str = NAME) -> TrainConfig:
    return TrainConfig(
        out=out, cache=str(cache), student=student, steps=2, batch_size=4, validation_examples=0, device="cpu"
    )


def test_a_cache_resumes_and_is_repaired_after_a_commit_to_the_readme(
    tmp_path: Path, hub: Hub, toy_teacher: Path, toy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hub.commit(NAME, toy_teacher)
    config, commit = cache_config(tmp_path / "cache", toy_data), Job.commit

    def ends_early(job: Job, data: bytes, record: Any) -> None:
        if job.committed:
            raise KeyboardInterrupt
        commit(job, data, record)

    monkeypatch.setattr(Job, "commit", ends_early)
    with pytest.raises(KeyboardInterrupt):
        build_cache(config)
    monkeypatch.setattr(Job, "commit", commit)
    unfinished = GrowingCache.open(config.out)
    assert unfinished is not None

    hub.commit(NAME, toy_teacher)
    manifest = build_cache(config)
    # where the model came from is as it was: a run that follows the cache knows it by this fingerprint
    assert manifest.identities["teacher"]["revision"] == first
    assert manifest.fingerprint == unfinished.fingerprint

    hub.commit(NAME, toy_teacher)
    assert build_cache(config) == manifest
    (tmp_path / "cache" / manifest.shards[0].path).unlink()
    assert repair_cache(config.out).bad == 1
    assert build_cache(config).fingerprint == manifest.fingerprint


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"generation_config.json": {"eos_token_id": [0, 3]}}, r"generation\.stop_token_ids: \[0\] -> \[0, 3\]"),
        ({"chat_template.jinja": "{{ messages[0].content }}"}, r"template\.sha256: "),
        ({"tokenizer_config.json": {"split_special_tokens": True}}, r"tokenizer\.(probe|sha256): "),
        ({"config.json": {"rms_norm_eps": 0.1}}, r"teacher\.config_sha256: .*; teacher\.revision: "),
    ],
)
def test_a_commit_that_changes_answers_is_refused(
    tmp_path: Path, hub: Hub, toy_teacher: Path, toy_data: Path, changed: dict[str, Any], message: str
) -> None:
    hub.commit(NAME, toy_teacher)
    config = cache_config(tmp_path / "cache", toy_data, limit=2)
    build_cache(config)
    hub.commit(NAME, toy_teacher, changed)
    with pytest.raises(UserError, match=rf"a finished cache with other options; differing: .*{message}"):
        build_cache(config)


def run_and_student(
    tmp_path: Path, hub: Hub, toy_cache: Path, toy_student: Path
) -> tuple[TrainConfig, InitStudentConfig]:
    """A finished run and a pruned student, both of a hub's model; the options that made them."""
    hub.commit(NAME, toy_student)
    config = train_config(tmp_path / "run", toy_cache)
    making = InitStudentConfig(teacher=NAME, out=tmp_path / "student", layers=1, keep="first")
    train(config)
    init_student(making)
    return config, making


def test_a_run_and_a_student_are_known_again_after_a_commit_to_the_readme(
    tmp_path: Path, hub: Hub, toy_cache: Path, toy_student: Path
) -> None:
    config, making = run_and_student(tmp_path, hub, toy_cache, toy_student)
    hub.commit(NAME, toy_student)
    (tmp_path / "run" / "run.json").unlink()
    train(config)
    assert (tmp_path / "run" / "run.json").is_file()
    init_student(making)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"generation_config.json": {"temperature": 0.6}}, r"generation_config_sha256: .*revision: "),
        ({"chat_template.jinja": "{{ messages[0].content }}"}, r"chat_template_sha256: .*revision: "),
        ({"config.json": {"rms_norm_eps": 0.1}}, r"config_sha256: .*revision: "),
    ],
)
def test_a_commit_that_changes_the_student_is_refused(
    tmp_path: Path, hub: Hub, toy_cache: Path, toy_student: Path, changed: dict[str, Any], message: str
) -> None:
    config, making = run_and_student(tmp_path, hub, toy_cache, toy_student)
    hub.commit(NAME, toy_student, changed)
    with pytest.raises(UserError, match=rf"another run; differing: student\.{message}"):
        train(config)
    with pytest.raises(UserError, match=rf"another student; differing: teacher\.{message}"):
        init_student(making)


def test_a_record_without_the_new_hashes_counts_for_its_revision_alone(
    tmp_path: Path, hub: Hub, toy_cache: Path, toy_student: Path
) -> None:
    """As 0.1.0 wrote it: only the revision says what tokenizer and generation config were."""
    hub.commit(NAME, toy_student)
    config = train_config(tmp_path / "run", toy_cache)
    train(config)
    path = tmp_path / "run" / "dpkd-run.json"
    record = json.loads(path.read_text())
    for key in ("tokenizer_sha256", "chat_template_sha256", "generation_config_sha256"):
        del record["student"][key]
    path.write_text(json.dumps(record))
    train(config)
    hub.commit(NAME, toy_student)
    with pytest.raises(UserError, match=r"another run; differing: student\.revision: \"0+1\" -> \"0+2\" \("):
        train(config)


def test_a_directory_may_have_another_name(tmp_path: Path, toy_cache: Path, toy_student: Path) -> None:
    train(train_config(tmp_path / "run", toy_cache, str(toy_student)))
    copied = shutil.copytree(toy_student, tmp_path / "copied")
    train(train_config(tmp_path / "run", toy_cache, str(copied)))
