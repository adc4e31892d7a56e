"""Runs on several caches: shares of the rows, epochs of each cache, metrics by cache, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.commands import dpkd
from support.toys import make_toy
from transformers import AutoModelForCausalLM

from dpkd.core.errors import UserError
from dpkd.distill.batches.batch import MicroBatch
from dpkd.distill.batches.collate import collate
from dpkd.distill.batches.shares import CacheShares
from dpkd.distill.objectives.objective import Objective
from dpkd.distill.objectives.student_forward import StudentScorer
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.run.setup import Run, open_run
from dpkd.distill.training import train
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.build.importing.importing import import_cache
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.options.derive import ImportConfig
from dpkd.teacher_cache.store.reader import TeacherCache


@pytest.fixture(scope="module")
def other_cache(
    tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Path, toy_student: Path, toy_data: Path
) -> Path:
    """A cache of another teacher on some of the toy rows, with fewer entries, other shards and a round `r0`."""
    folder = tmp_path_factory.mktemp("several")
    lines = toy_data.read_text(encoding="utf-8").splitlines()[7:]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    teacher = make_toy(folder / "teacher", toy_tokenizer, layers=2, seed=9)
    options: dict[str, Any] = {
        "teacher": str(teacher), "out": folder / "zoo", "engine": "transformers", "template": "chat",
        "max_new_tokens": 9, "top_k": 8, "rows_per_shard": 5, "device": "cpu",
    }  # fmt: skip
    build_cache(CacheConfig(**options, data=str(folder / "rows.jsonl"), responses="both"))
    build_cache(CacheConfig(**options, student=str(toy_student), round="r0"))
    return folder / "zoo"


def config(out: Path, caches: Any, student: Path, **options: Any) -> TrainConfig:
    defaults = {"steps": 4, "batch_size": 6, "learning_rate": 1e-3, "device": "cpu", "tracker": "none"}
    return TrainConfig(out=out, cache=caches, student=str(student), **(defaults | options))


def lines(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith(("_s", "_bytes"))} for line in found]


def read_rows(run: Run) -> list[tuple[int, str, str, int]]:
    """Cache, origin and key of every row that the run reads, in order."""
    indices = [index for step in range(run.steps) for part in run.order.micro_batches_of(step) for index in part]
    rows = [run.rows.row(*index) for index in indices]
    return [(row.cache or 0, row.chosen.origin, row.chosen.example_id, row.chosen.sample) for row in rows]


# the order


sizes_of_caches = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=2, max_size=4)


@given(sizes_of_caches, st.data(), st.integers(0, 2**31))
def test_each_cache_is_read_once_an_epoch_of_its_own(sizes: list[list[int]], data: st.DataObject, seed: int) -> None:
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0, 7.0]), min_size=len(sizes), max_size=len(sizes)))
    if not sum(weights):
        return
    names = [str(number) for number in range(len(sizes))]
    shares = CacheShares(sizes, weights, names, seed)
    rows = [tuple(row) for epoch in range(4) for row in shares.epoch(epoch).tolist()]
    first_group = np.cumsum([0, *map(len, sizes)])
    numbers = shares.caches_of(0, len(rows))
    # any part of the stream is the same function of its place
    assert numbers[1:4].tolist() == shares.caches_of(1, 3).tolist()
    again = CacheShares(sizes, weights, names, seed)
    assert [tuple(row) for row in again.epoch(3).tolist()] == rows[3 * shares.num_rows :]
    for number, groups in enumerate(sizes):
        own = [
            (group - first_group[number], index)
            for (group, index), of in zip(rows, numbers, strict=True)
            if of == number
        ]
        whole = [(group, index) for group, size in enumerate(groups) for index in range(size)]
        for start in range(0, len(own), len(whole)):
            epoch = own[start : start + len(whole)]
            assert len(set(epoch)) == len(epoch)
            assert len(epoch) < len(whole) or sorted(epoch) == whole
        assert weights[number] or not own
    for position in (0, 1, shares.num_rows, len(rows) - 1):
        counts = np.bincount(numbers[:position], minlength=len(sizes)).tolist()
        assert shares.rows_before(position) == counts


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1, 1), (90, 9, 1), (0.5, 0.25, 0.125, 0.125)])
def test_any_stretch_of_rows_has_the_shares(weights: tuple[float, ...]) -> None:
    """Less than four rows off in a stretch of any length; independent draws would be off by their square root."""
    shares = CacheShares([[40]] * len(weights), weights, [str(number) for number in range(len(weights))], 3)
    numbers = shares.caches_of(0, 20_000)
    for number, weight in enumerate(weights):
        counts = np.concatenate([[0], np.cumsum(numbers == number)])
        for length in (8, 64, 1000, 10_000):
            stretches = counts[length:] - counts[:-length]
            assert np.abs(stretches - length * weight / sum(weights)).max() < 4


# a run


def test_rows_are_drawn_in_the_shares_and_every_row_once_an_epoch(
    toy_cache: Path, other_cache: Path, toy_student: Path
) -> None:
    both = [f"{toy_cache}=0.7", f"{other_cache}=0.3"]
    run = open_run(config(Path("out"), both, toy_student, steps=60, validation_examples=4))
    rows = read_rows(run)
    assert len(rows) == 360
    counts = Counter(number for number, *_ in rows)
    assert abs(counts[0] - 252) < 3
    held_out: list[set[str]] = []
    for number, path in enumerate((toy_cache, other_cache)):
        own = [key for of, *key in rows if of == number]
        cache = TeacherCache.open(path)
        size = sum(run.caches[number].rows.group_sizes)
        every = Counter(map(tuple, own[:size]))
        assert set(every.values()) == {1}
        assert Counter(map(tuple, own[size : 2 * size])) == every
        trained = {example_id for _, example_id, _ in own}
        all_ids = {
            cache.read(record).row(index).example_id for record in cache.shards() for index in range(record.rows)
        }
        held_out.append(all_ids - trained)
        assert run.epochs(59)[f"epoch/{path.name}"] == sum(of == number for of, *_ in rows[: 59 * 6]) // size
    # an example of both caches is held out of both
    assert len(held_out[0] | held_out[1]) >= 4
    trained_ids = {example_id for _, _, example_id, _ in rows}
    assert not trained_ids & (held_out[0] | held_out[1])
    validation = run.validation.rows
    assert validation is not None
    found = [validation.row(group, index) for group, size in enumerate(validation.group_sizes) for index in range(size)]
    assert {row.cache for row in found} == {0, 1}
    assert {row.chosen.example_id for row in found} == held_out[0] | held_out[1]


def test_without_weights_an_epoch_is_the_union(toy_cache: Path, other_cache: Path, toy_student: Path) -> None:
    run = open_run(
        config(
            Path("out"), [str(toy_cache), str(other_cache)], toy_student, steps=None, epochs=1, batch_size=1,
            validation_examples=0,
        )
    )  # fmt: skip
    rows = read_rows(run)
    assert len(rows) == 40 + 26
    counts = Counter(rows)
    assert abs(sum(of == 0 for of, *_ in rows) - 40) < 2
    assert len(counts) >= 64  # up to the rows that the shares are off by


def test_weights_by_tokens_give_the_tokens_their_shares(toy_cache: Path, other_cache: Path, toy_student: Path) -> None:
    both = [f"{toy_cache}=1", f"{other_cache}=1"]
    run = open_run(config(Path("out"), both, toy_student, steps=200, cache_weights="tokens", validation_examples=0))
    tokens = Counter[int]()
    for step in range(run.steps):
        for index in run.order.micro_batches_of(step)[0]:
            row = run.rows.row(*index)
            tokens[row.cache or 0] += len(row.chosen.response_ids)
    assert abs(tokens[0] / sum(tokens.values()) - 0.5) < 0.01


def test_batches_by_tokens_read_every_row_once_an_epoch(toy_cache: Path, other_cache: Path, toy_student: Path) -> None:
    both = [f"{toy_cache}=2", f"{other_cache}=1"]
    one, two = (
        open_run(
            config(
                Path("out"), both, toy_student, steps=30, batch_tokens=900, gradient_accumulation_steps=4 // ranks,
                validation_examples=0,
            ),
            num_processes=ranks,
        )
        for ranks in (1, 2)
    )  # fmt: skip
    assert [one.order.micro_batches_of(step) for step in range(30)] == [
        two.order.micro_batches_of(step) for step in range(30)
    ]
    rows = read_rows(one)
    assert abs(sum(of == 0 for of, *_ in rows) / len(rows) - 2 / 3) < 0.03
    first = rows[: one.order.num_rows]  # the epoch of the run: 44 rows of the one, 22 of the other
    assert len([row for row in set(first) if row[0] == 0]) == 40
    assert max(Counter(first).values()) == 2
    lengths = one.rows.lengths_by_group()
    for micro_batch in (part for step in range(30) for part in one.order.micro_batches_of(step)):
        longest = max(lengths[group][index] for group, index in micro_batch)
        assert longest * len(micro_batch) <= 900


def test_metrics_by_cache_are_those_of_its_rows(
    tmp_path: Path, toy_cache: Path, other_cache: Path, toy_student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The KL of each cache, from its rows alone, in the first step and before it on the held-out rows."""
    both = [f"a:{toy_cache}=3", f"b:{other_cache}=1"]
    out = train(config(tmp_path / "run", both, toy_student, validation_examples=5))
    run = open_run(config(tmp_path / "again", both, toy_student, validation_examples=5))
    model = AutoModelForCausalLM.from_pretrained(toy_student).eval()
    scorer = StudentScorer(model, num_tokens=len(run.student.tokenizer), logits_chunk=1024)
    objective = Objective(config(tmp_path, str(toy_cache), toy_student), run.vocab_size)
    held_out = run.validation.rows
    assert held_out is not None
    places = [(group, index) for group, size in enumerate(held_out.group_sizes) for index in range(size)]
    for line, rows in (
        (lines(out, "validation")[0], [held_out.row(*place) for place in places]),
        (lines(out)[0], [run.rows.row(*place) for place in run.order.micro_batches_of(0)[0]]),
    ):
        sums = {}
        for number, name in enumerate("ab"):
            own = [replace(row, cache=None) for row in rows if row.cache == number]
            with torch.no_grad():
                found = objective(scorer, MicroBatch(collate(own, with_distributions=True))).metrics
            for metric in ("kld", "rkld", "top1_agreement"):
                total, count = found[metric]
                assert math.isclose(line[f"{metric}/{name}"], float(total) / count, rel_tol=1e-4), (metric, name)
            sums[name] = found["kld"]
        positions = sum(count for _, count in sums.values())
        assert math.isclose(line["kld"], float(sum(total for total, _ in sums.values())) / positions, rel_tol=1e-4)
    assert lines(out)[0]["epoch/a"] == 0
    said = capsys.readouterr().err
    assert "caches: a 75.0% of the rows" in said
    first, last = lines(out, "validation")[0], lines(out, "validation")[-1]
    assert f"(a {first['kld/a']:.2f} -> {last['kld/a']:.2f}, b {first['kld/b']:.2f} -> {last['kld/b']:.2f})" in said
    facts = json.loads((out / "dpkd.json").read_text())
    prints = [TeacherCache.open(path).fingerprint for path in (toy_cache, other_cache)]
    assert facts["caches"] == {"a": {"weight": 3.0, "cache": prints[0]}, "b": {"weight": 1.0, "cache": prints[1]}}
    card = (out / "README.md").read_text()
    assert all(text in card for text in ("Teacher a", "Teacher b", *prints, "kld/a", "kld/b", "75.0% of the rows"))


def test_a_step_without_rows_of_a_cache_has_no_metrics_of_it(
    tmp_path: Path, toy_cache: Path, other_cache: Path, toy_student: Path
) -> None:
    both = [f"{toy_cache}=1", f"{other_cache}=0"]
    out = train(config(tmp_path / "run", both, toy_student, steps=2, validation_examples=5))
    assert all(line["kld/zoo"] is None and line["kld/toy"] == line["kld"] for line in lines(out))
    assert all(line["kld/zoo"] > 0 for line in lines(out, "validation"))


def test_resuming_and_accumulation_change_nothing(
    tmp_path: Path, toy_cache: Path, other_cache: Path, toy_student: Path
) -> None:
    both = [f"{toy_cache}=0.7", f"{other_cache}=0.3"]
    options: dict[str, Any] = {"steps": 7, "save_every": 3, "keep_checkpoints": 5, "validation_examples": 5}
    whole = train(config(tmp_path / "whole", both, toy_student, **options))
    again = Path(shutil.copytree(whole, tmp_path / "again"))
    shutil.rmtree(again / "checkpoint-6")
    for name in ("run.json", "model.safetensors"):
        (again / name).unlink()
    train(config(again, both, toy_student, **options))
    assert lines(again) == lines(whole)
    ours, theirs = (load_file(run / "model.safetensors") for run in (again, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    parts = train(
        config(tmp_path / "parts", both, toy_student, **options | {"batch_size": 2}, gradient_accumulation_steps=3)
    )
    for one, two in zip(lines(whole), lines(parts), strict=True):
        for key in ("loss", "kld/toy", "kld/zoo", "epoch/toy", "tokens"):
            assert math.isclose(one[key], two[key], rel_tol=1e-4)
    (again / "run.json").unlink()
    with pytest.raises(
        UserError, match=r"differing: caches\.toy\.weight: 0\.7 -> 0\.6; caches\.zoo\.weight: 0\.3 -> 0\.4"
    ):
        train(config(again, [f"{toy_cache}=0.6", f"{other_cache}=0.4"], toy_student, **options))


def test_a_round_of_each_cache(tmp_path: Path, toy_cache: Path, other_cache: Path, toy_student: Path) -> None:
    both = [f"{toy_cache}=1", f"{other_cache}=1"]
    for options in ({"level": "sequence"}, {"mix": 0.5}, {"objective": "distillm2"}):
        run = open_run(config(Path("out"), both, toy_student, round="r0", validation_examples=4, **options))
        rows = [run.rows.row(*index) for step in range(4) for index in run.order.micro_batches_of(step)[0]]
        assert {row.cache for row in rows} == {0, 1}
        assert {row.chosen.origin for row in rows} == ({"teacher", "student"} if "mix" in options else {"teacher"})
    out = train(config(tmp_path / "run", both, toy_student, round="r0", mix=0.5, steps=2, validation_examples=4))
    assert len(json.loads((out / "dpkd.json").read_text())["caches"]["zoo"]["round"]) == 64
    assert lines(out)[0]["kld/zoo"] > 0


def test_rewards_are_those_of_rows_that_a_teacher_has_scored(
    tmp_path: Path, toy_cache: Path, toy_tokenizer: Path, toy_student: Path
) -> None:
    """Beside a cache of texts alone, whichever of the two a step's first micro-batch has a row of."""
    rows = [
        {"messages": [{"role": "user", "content": f"Question {number}?"}], "response": f"The answer is {number}."}
        for number in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {"source": tmp_path / "rows.jsonl", "source_format": "jsonl", "tokenizer": str(toy_tokenizer)}
    import_cache(ImportConfig(out=str(tmp_path / "texts"), template="chat", **options))
    both = [f"{toy_cache}=1", f"{tmp_path / 'texts'}=1"]
    options = {"objective": "seqkd", "batch_size": 1, "gradient_accumulation_steps": 2, "validation_examples": 2}
    run = train(config(tmp_path / "run", both, toy_student, **options))
    assert any(line["reward_chosen"] is not None for line in lines(run))
    assert all(line["reward_chosen"] < 0 for line in lines(run, "validation"))


def test_teachers_pull_the_student_by_their_weights(
    tmp_path: Path, toy_cache: Path, other_cache: Path, toy_student: Path
) -> None:
    """The claim: more weight of a teacher brings the student closer to it."""
    distances = {}
    for weight in (0.1, 0.9):
        both = [f"{toy_cache}={weight}", f"{other_cache}={1 - weight}"]
        out = train(
            config(tmp_path / str(weight), both, toy_student, steps=40, validation_examples=4, best_metric="last")
        )
        distances[weight] = lines(out, "validation")[-1]
    assert distances[0.9]["kld/toy"] < distances[0.1]["kld/toy"]
    assert distances[0.9]["kld/zoo"] > distances[0.1]["kld/zoo"]


# the option


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ("a=0.5", [("a=0.5", "a=0.5", None)]),
        (["x/a"], [("a", "x/a", None)]),
        (["x/a", "y/b/"], [("a", "x/a", None), ("b", "y/b/", None)]),
        (["x/a=0.7", "s3://bucket/b=3"], [("a", "x/a", 0.7), ("b", "s3://bucket/b", 3.0)]),
        (["one:x/a=0.7", "two:s3://bucket/a=.3"], [("one", "x/a", 0.7), ("two", "s3://bucket/a", 0.3)]),
        (["x/a=b", "x/c"], [("a=b", "x/a=b", None)]),
    ],
)
def test_a_cache_has_a_name_a_place_and_a_weight(texts: Any, expected: list[tuple[str, str, float | None]]) -> None:
    if expected[0][0] == "a=b":
        with pytest.raises(UserError, match="'a=b' cannot be a name in logs"):
            TrainConfig.parse({"cache": texts, "student": "s", "out": "o"}, where="here")
        return
    choices = TrainConfig(cache=texts, student="s", out=Path("o")).caches
    assert [(choice.name, choice.location, choice.weight) for choice in choices] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": ["a=0", "b=0"]}, r"the weights sum to 0, found a=0, b=0: give one of them a weight above 0"),
        ({"cache": ["a=1", "b"]}, r"some caches have a weight and others have none, found a=1, b: give all or none"),
        ({"cache": ["a=-1", "b=1"]}, r"a weight must be a number of 0 or more, found -1 for a"),
        ({"cache": ["a=nan", "b=1"]}, r"a weight must be a number of 0 or more, found nan for a"),
        ({"cache": ["x/a=1", "y/a=1"]}, r"two caches have the name 'a', found x/a and y/a: give NAME:PATH=WEIGHT"),
        ({"cache": ["n:s3://u:p@b/a=1", "b=1"]}, r"the s3 URL holds a user name or password"),
        ({"cache": ["a", "b"], "follow": True}, r"--follow takes one --cache"),
        (
            {"cache": ["a", "b"], "student_samples": "live", "teacher_url": "http://127.0.0.1:1"},
            r"--student-samples live takes one --cache: a server has one teacher",
        ),
        ({"cache": "a", "cache_weights": "tokens"}, r"--cache-weights tokens needs several caches with weights"),
        ({"cache": ["a", "b"], "cache_weights": "tokens"}, r"--cache-weights tokens needs several caches with weights"),
    ],
)
def test_what_cannot_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        TrainConfig.parse({"student": "s", "out": "o"} | options, where="here")
    assert "\n" not in str(caught.value)


def test_caches_of_two_tokenizers_or_templates_are_refused(
    tmp_path: Path, toy_cache: Path, toy_teacher: Path, other_student: Path, toy_student: Path, toy_data: Path
) -> None:
    def build(name: str, teacher: Path, template: Any) -> str:
        build_cache(
            CacheConfig(
                teacher=str(teacher), data=str(toy_data), out=str(tmp_path / name), engine="transformers",
                template=template, max_new_tokens=4, limit=2, device="cpu",
            )
        )  # fmt: skip
        return str(tmp_path / name)

    other = build("west", other_student, "chat")
    first = TeacherCache.open(toy_cache).identities["tokenizer"]["sha256"][:12]
    second = TeacherCache.open(other).identities["tokenizer"]["sha256"][:12]
    with pytest.raises(UserError) as caught:
        open_run(config(Path("out"), [str(toy_cache), other], toy_student))
    said = str(caught.value)
    assert f"the caches toy and west differ in their tokenizer: found {second}" in said
    assert f"of west, expected {first}" in said
    with pytest.raises(
        UserError, match=r"toy and written differ in their template: found .*raw.* of written, expected .*chat"
    ):
        open_run(config(Path("out"), [str(toy_cache), build("written", toy_teacher, "raw")], toy_student))
    copy = shutil.copytree(toy_cache, tmp_path / "copy")
    with pytest.raises(UserError, match=r"the caches copy and toy are the same one: found fingerprint .* twice"):
        open_run(config(Path("out"), [str(toy_cache), str(copy)], toy_student))
    narrow = tmp_path / "narrow"
    build_cache(
        CacheConfig(
            teacher=str(toy_teacher), data=str(toy_data), out=str(narrow), engine="transformers", template="chat",
            max_new_tokens=4, limit=3, top_k=10, device="cpu",
        )
    )  # fmt: skip
    with pytest.raises(UserError, match="top_k is more than the cache keeps: found top_k 12, expected at most 10"):
        open_run(config(Path("out"), [str(toy_cache), str(narrow)], toy_student, top_k=12))


def test_every_cache_is_verified_before_the_first_step(
    tmp_path: Path, toy_cache: Path, other_cache: Path, toy_student: Path
) -> None:
    damaged = Path(shutil.copytree(other_cache, tmp_path / "damaged"))
    shard = sorted((damaged / "shards").iterdir())[-1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(UserError, match=rf"checksum mismatch.*{shard.name}"):
        train(config(tmp_path / "run", [f"{toy_cache}=1", f"{damaged}=1"], toy_student))
    said = dpkd(
        "train", "--cache", f"{toy_cache}=0", "--cache", f"{other_cache}=0", "--student", toy_student, "--out",
        tmp_path / "run",
    )  # fmt: skip
    assert said.returncode == 2
    assert said.stderr.count("\n") == 1
    assert "--cache: the weights sum to 0, found toy=0, zoo=0: give one of them a weight above 0" in said.stderr
    assert not (tmp_path / "run").exists()


def test_the_command_takes_the_option_several_times(
    tmp_path: Path, toy_cache: Path, other_cache: Path, toy_student: Path
) -> None:
    """The run of the command is that of the function; a single cache is the run without any of this."""
    said = dpkd(
        "train", "--cache", f"{toy_cache}=0.5", "--cache", f"{other_cache}=0.5", "--student", toy_student, "--out",
        tmp_path / "command", "--steps", "2", "--batch-size", "6", "--learning-rate", "1e-3", "--device", "cpu",
        "--tracker", "none",
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    function = train(config(tmp_path / "function", (f"{toy_cache}=0.5", f"{other_cache}=0.5"), toy_student, steps=2))
    assert lines(tmp_path / "command") == lines(function)
    one = train(config(tmp_path / "one", [str(toy_cache)], toy_student, steps=2))
    assert lines(one) == lines(train(config(tmp_path / "as-ever", str(toy_cache), toy_student, steps=2)))
    assert not [key for key in lines(one)[0] if "/" in key]
    toml = (tmp_path / "command" / "dpkd.toml").read_text()
    assert "cache_weights" in toml
    again = dpkd("train", "--config", tmp_path / "command" / "dpkd.toml")
    assert "is complete" in again.stderr
