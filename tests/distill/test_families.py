"""The three commands on toy models of several families, against the losses of plain torch on full logits."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.reference import largest_gap_to_teacher, step_losses
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
)

from dpkd.core.errors import UserError
from dpkd.core.models import locate_model
from dpkd.distill.batches.batch import Batch, narrowed
from dpkd.distill.objectives.student_forward import check_head
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.training import train
from dpkd.pipelines.cli import run
from dpkd.teacher_cache.store.codec import MAX_ERROR_NATS
from dpkd.teacher_cache.store.reader import TeacherCache

NUM_TOKENS = 600  # of the toy tokenizer
NO_DROPOUT = {"attention_dropout": 0.0}
GATED = {"intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.15}


def gpt2(layers: int, width: int, **options: Any) -> PretrainedConfig:
    """Learned positions; no pad token; the head is tied."""
    sizes = {"n_embd": 64, "n_layer": layers, "n_head": 2, "n_positions": 320, "initializer_range": 0.1}
    off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPT2Config(vocab_size=width, eos_token_id=0, bos_token_id=0, pad_token_id=None, **sizes, **off, **options)


def opt(layers: int, width: int, **options: Any) -> PretrainedConfig:
    """Learned positions with an offset of 2; embeddings narrower than the model."""
    sizes = {"hidden_size": 64, "num_hidden_layers": layers, "ffn_dim": 128, "num_attention_heads": 2, "init_std": 0.15}
    ids = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 1}
    return OPTConfig(
        vocab_size=width, word_embed_proj_dim=32, max_position_embeddings=320, dropout=0.0, **NO_DROPOUT,
        **sizes, **ids, **options,
    )  # fmt: skip


def gated(kind: Callable[..., PretrainedConfig]) -> Callable[..., PretrainedConfig]:
    """Llama and its relatives: rotary positions."""

    def make(layers: int, width: int, **options: Any) -> PretrainedConfig:
        ids = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
        sizes = {"hidden_size": 64, "num_hidden_layers": layers, "max_position_embeddings": 320}
        return kind(vocab_size=width, **sizes, **GATED, **ids, **NO_DROPOUT, **options)

    return make


@dataclass(frozen=True)
class Family:
    """How teacher and student are made, and how wide their logits are."""

    config: Callable[..., PretrainedConfig]
    options: dict[str, Any]
    teacher_width: int = NUM_TOKENS
    student_width: int = NUM_TOKENS

    @property
    def is_padded(self) -> bool:
        return max(self.teacher_width, self.student_width) > NUM_TOKENS


SOFT_CAPPED = {"head_dim": 32, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "sliding_window": 64}
FAMILIES = {
    "gpt2": Family(gpt2, {}),
    "opt": Family(opt, {}),
    "opt-untied": Family(opt, {"tie_word_embeddings": False}),
    "llama-untied": Family(gated(LlamaConfig), {"tie_word_embeddings": False}),
    "qwen2": Family(gated(Qwen2Config), {"tie_word_embeddings": True}),
    "gemma": Family(gated(GemmaConfig), {"head_dim": 32}),
    "gemma2-softcapped": Family(gated(Gemma2Config), SOFT_CAPPED),
    "llama-padded": Family(gated(LlamaConfig), {"tie_word_embeddings": True}, 640, 640),
    "qwen2-wider-student": Family(gated(Qwen2Config), {"tie_word_embeddings": False}, 608, 640),
    "qwen2-wider-teacher": Family(gated(Qwen2Config), {"tie_word_embeddings": False}, 640, 608),
    "gpt2-wider-teacher": Family(gpt2, {}, 640, NUM_TOKENS),
}


def make_model(directory: Path, tokenizer_dir: Path, config: PretrainedConfig, seed: int) -> Path:
    """Random weights. Logits that pad the vocabulary are nine tenths of those of the first tokens: likely, never first.

    So greedy responses hold tokens alone, and the kept entries hold padding.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings().weight
    assert (head is model.get_input_embeddings().weight) == config.tie_word_embeddings
    with torch.no_grad():
        head[NUM_TOKENS:] = 0.9 * head[: max(len(head) - NUM_TOKENS, 0)]
    model.save_pretrained(directory)
    for file in tokenizer_dir.glob("*"):
        shutil.copyfile(file, directory / file.name)
    return directory


def dpkd(*arguments: object, status: int = 0) -> str:
    """Run a command in this process; what it printed, on both streams."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        assert run(list(map(str, arguments))) == status
    return printed.getvalue()


@dataclass(frozen=True)
class Toys:
    """Teacher, student and a cache of theirs with the round `r0`."""

    teacher: Path
    student: Path
    cache: Path


def build(directory: Path, tokenizer_dir: Path, data: Path, family: Family, *, temperature: float) -> Toys:
    teacher = make_model(
        directory / "teacher", tokenizer_dir, family.config(2, family.teacher_width, **family.options), seed=1
    )
    student = make_model(
        directory / "student", tokenizer_dir, family.config(1, family.student_width, **family.options), seed=2
    )
    asked = ("--teacher", teacher, "--out", directory / "cache", "--engine", "transformers", "--device", "cpu")
    asked += ("--max-new-tokens", 10, "--top-k", 48, "--temperature", temperature)
    dpkd(
        "cache-teacher", *asked, "--data", data, "--template", "chat", "--responses", "both", "--limit", 4,
        "--set", "rows_per_shard=3",
    )  # fmt: skip
    dpkd("cache-teacher", *asked, "--student", student, "--round", "r0")
    return Toys(teacher, student, directory / "cache")


def first_step(out: Path, toys: Toys, *options: object) -> tuple[dict[str, Any], TrainConfig]:
    """Two steps of training, each over the whole cache: the first line of the log, and the options as they were."""
    dpkd(
        "train", "--cache", toys.cache, "--student", toys.student, "--out", out, "--steps", 2, "--batch-size", 4,
        "--device", "cpu", "--set", "gradient_accumulation_steps=2", "--set", "sft_weight=0.5",
        "--set", "kd_weight=0.7", *options,
    )  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["tokens"] == lines[1]["tokens"]
    return lines[0], TrainConfig.model_validate(tomllib.loads((out / "dpkd.toml").read_text()))


def assert_equal(line: dict[str, Any], expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert math.isclose(line[name], value, rel_tol=1e-4), f"{name}: {line[name]}, from full logits {value}"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_three_commands_agree_with_full_logits(
    name: str, tmp_path: Path, toy_tokenizer: Path, toy_data: Path
) -> None:
    family = FAMILIES[name]
    toys = build(tmp_path, toy_tokenizer, toy_data, family, temperature=0.0 if family.is_padded else 1.0)
    of_responses, of_entries = largest_gap_to_teacher(toys.cache, toys.teacher, "r0")
    assert of_responses < 1e-4
    assert of_entries < MAX_ERROR_NATS + 1e-4
    if family.is_padded:
        assert share_of_padding(toys.cache) > 0.005

    whole = ("--level", "sequence", "--round", "r0", "--responses", "all")
    for name, options in (
        ("token", ("--beta", 0.5)),
        ("argmax", ("--beta", 0.5, "--token-pairs", "argmax")),
        ("sequence", whole),
        ("eq9", (*whole, "--label-smoothing", 0)),
    ):
        line, config = first_step(tmp_path / name, toys, *options)
        assert_equal(line, step_losses(config))

    models = [f"{part}={tmp_path / part}" for part in ("teacher", "token", "sequence")]
    dpkd(
        "eval", *(flag for model in models for flag in ("--model", model)), "--data", f"toy={toy_data}",
        "--template", "chat", "--out", tmp_path / "report", "--limit", 2, "--seeds", 10, "--max-new-tokens", 6,
        "--engine", "transformers", "--device", "cpu",
    )  # fmt: skip
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [report["models"][part]["data"]["toy"]["n"] for part in ("teacher", "token", "sequence")] == [2, 2, 2]


@pytest.mark.parametrize("config", [
    CohereConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=1, logit_scale=0.25, eos_token_id=0, bos_token_id=0, pad_token_id=None),
    GraniteConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                  num_key_value_heads=1, logits_scaling=8.0, eos_token_id=0, bos_token_id=0, pad_token_id=None),
], ids=lambda config: config.model_type)  # fmt: skip
@torch.no_grad()
def test_scaled_logits_are_known(config: PretrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config)
    check_head(model, config.model_type)
    ids = torch.arange(1, 9)[None]
    unscaled = model.get_output_embeddings()(model.get_decoder()(input_ids=ids)[0])
    assert not torch.allclose(unscaled, model(input_ids=ids).logits, rtol=0.1)


@pytest.fixture(scope="module")
def wider_teacher(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Path, toy_data: Path) -> Toys:
    family = Family(gated(LlamaConfig), {"tie_word_embeddings": True}, 640, NUM_TOKENS)
    toys = build(tmp_path_factory.mktemp("wider"), toy_tokenizer, toy_data, family, temperature=0.0)
    asked = ("--teacher", toys.teacher, "--out", toys.cache, "--engine", "transformers", "--device", "cpu")
    dpkd("cache-teacher", *asked, "--student", toys.student, "--round", "drawn", "--temperature", 1)
    return toys


@pytest.mark.parametrize(
    "options",
    [
        {"tail": "uniform", "objective": "jsd"},
        {"tail": "renormalise", "objective": "reverse-kl"},
        {"objective": "akl"},
        {"objective": "minillm", "round": "drawn"},
        {"objective": "distillm2", "round": "drawn"},
        {"token_pairs": "drawn"},
        {"validation_examples": 1},
    ],
    ids=str,
)
def test_every_reader_of_the_cache_takes_a_wider_teacher(
    tmp_path: Path, wider_teacher: Toys, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(config_of(tmp_path / "run", wider_teacher.cache, wider_teacher.student, **options))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) and line["kld"] >= 0 for line in lines)
    said = "the student has 600 logits and the teacher 640: the teacher's probability of ids 600 and above counts"
    assert capsys.readouterr().err.count(said) == 1


def config_of(out: Path, cache: Path, student: Path, **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"steps": 2, "batch_size": 4, "device": "cpu"}
    return TrainConfig(out=out, cache=str(cache), student=str(student), **(defaults | options))


def test_entries_without_a_logit_are_part_of_the_tail() -> None:
    """By hand: position 0 keeps its first and last entry, position 1 loses its likeliest, position 2 nothing."""
    ids = torch.tensor([[3, 9, 1], [8, 2, -1], [0, 1, 2]])
    p = torch.tensor([[0.5, 0.2, 0.1], [0.6, 0.3, 0.0], [0.5, 0.25, 0.25]])
    held = batch(ids, p.log(), torch.tensor([3, 2, 3]), torch.tensor([0.2, 0.1, 0.0]).log())
    found = narrowed(held, 8)
    assert found.entry_ids_TK is not None
    assert found.entry_logprobs_TK is not None
    assert found.entry_counts_T is not None
    assert found.log_tail_T is not None
    assert found.entry_ids_TK.tolist() == [[3, 1, -1], [2, -1, -1], [0, 1, 2]]
    assert found.entry_counts_T.tolist() == [2, 1, 3]
    expected = torch.tensor([[0.5, 0.1, 0.0], [0.3, 0.0, 0.0], [0.5, 0.25, 0.25]])
    torch.testing.assert_close(found.entry_logprobs_TK.exp(), expected)
    torch.testing.assert_close(found.log_tail_T.exp(), torch.tensor([0.4, 0.7, 0.0]))
    assert narrowed(held, 10) is held
    with pytest.raises(UserError, match=r"the student has no logit for any id that the cache keeps.* row row-0\)"):
        narrowed(replace(held, input_ids_BS=torch.ones(1, 4, dtype=torch.long)), 2)
    with pytest.raises(UserError, match=r"no embedding for: found id 7, expected ids below 7 \(in rows row-0\)"):
        narrowed(held, 7)


def batch(ids_TK: torch.Tensor, logprobs_TK: torch.Tensor, counts_T: torch.Tensor, rest_T: torch.Tensor) -> Batch:
    """One row with the token 7 in it, and these distributions on its three positions."""
    ids = [7, 1, 2, 3]
    return Batch(
        example_ids=["row-0"],
        input_ids_BS=torch.tensor([ids]),
        attention_mask_BS=torch.ones(1, 4, dtype=torch.long),
        row_T=torch.zeros(3, dtype=torch.long),
        predict_T=torch.arange(3),
        target_T=torch.tensor(ids[1:]),
        num_tokens_B=torch.tensor([3]),
        unfinished_B=torch.tensor([False]),
        num_chosen=1,
        teacher_logprob_T=None,
        entry_ids_TK=ids_TK,
        entry_logprobs_TK=logprobs_TK,
        entry_counts_T=counts_T,
        log_tail_T=rest_T,
    )


def test_text_that_a_narrower_student_cannot_read_is_refused_with_the_number_of_rows(
    tmp_path: Path, toy_tokenizer: Path, toy_data: Path
) -> None:
    """Drawn at temperature 1, responses of a toy hold padding."""
    family = Family(gated(LlamaConfig), {"tie_word_embeddings": True}, 640, NUM_TOKENS)
    toys = build(tmp_path, toy_tokenizer, toy_data, family, temperature=1.0)
    cache = TeacherCache.open(toys.cache)
    shards = [shard for _, shard in cache.scan(cache.shards("teacher"))]
    responses = [shard.row(index).response_ids for shard in shards for index in range(len(shard))]
    count = sum(bool((ids >= NUM_TOKENS).any()) for ids in responses)
    largest = max(int(ids.max()) for ids in responses)
    assert count > 0
    with pytest.raises(
        UserError,
        match=rf"no embedding for: found {count} rows with ids up to {largest}, expected ids below 600 .*"
        rf"resize_token_embeddings\({largest + 1}\)",
    ):
        train(config_of(tmp_path / "run", toys.cache, toys.student))
    assert not (tmp_path / "run").exists()
    train(config_of(tmp_path / "run", toys.cache, toys.student, responses="reference"))

    # the way out that the message names
    wider = AutoModelForCausalLM.from_pretrained(toys.student)
    wider.resize_token_embeddings(largest + 1)
    directory = Path(shutil.copytree(toys.student, tmp_path / "wider"))
    wider.save_pretrained(directory)
    train(config_of(tmp_path / "again", toys.cache, directory))


def test_a_wider_student_s_padding_is_set_aside_in_a_round(tmp_path: Path, toy_tokenizer: Path, toy_data: Path) -> None:
    """The teacher has no place for it; the other rows of the round are there and are learnt from."""
    family = Family(gated(LlamaConfig), {"tie_word_embeddings": True}, 601, 640)
    toys = build(tmp_path, toy_tokenizer, toy_data, family, temperature=0.0)
    asked = ("--teacher", toys.teacher, "--out", toys.cache, "--engine", "transformers", "--device", "cpu")
    asked += ("--student", toys.student, "--max-new-tokens", 6, "--temperature", 1, "--top-k", 48)
    printed = dpkd("cache-teacher", *asked, "--round", "drawn", status=3)
    assert "which the teacher does not have" in printed
    held = TeacherCache.open(toys.cache).round("drawn")
    assert 0 < len(held.manifest.failed) < 8
    train(config_of(tmp_path / "run", toys.cache, toys.student, level="sequence", round="drawn", batch_size=2))


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama-untied"])
def test_rows_fill_the_positions_to_the_last_and_not_beyond(
    name: str, tmp_path: Path, toy_tokenizer: Path, toy_cache: Path
) -> None:
    cache = TeacherCache.open(toy_cache)
    longest = max(shard.longest for shard in cache.shards())
    lengths = [
        len(shard.row(index).prompt_ids) + len(shard.row(index).response_ids)
        for _, shard in cache.scan(cache.shards())
        for index in range(len(shard))
    ]
    count = lengths.count(longest)
    for limit in (longest, longest - 1):
        config = FAMILIES[name].config(1, NUM_TOKENS)
        config.max_position_embeddings = limit
        student = make_model(tmp_path / f"positions-{limit}", toy_tokenizer, config, seed=3)
        asked = config_of(tmp_path / "run", toy_cache, student, steps=1, batch_size=len(lengths), validation_examples=0)
        if limit == longest:
            train(asked)
            shutil.rmtree(asked.out)
        else:
            with pytest.raises(
                UserError, match=f"found {longest} tokens, expected at most {limit}, which {count} of 40 rows exceed"
            ):
                train(asked)
            assert not asked.out.exists()


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_every_stop_id_of_a_model_ends_a_response(
    place: str, tmp_path: Path, toy_tokenizer: Path, toy_data: Path
) -> None:
    """A chat model names several; those of its generation config go before those of its config, as in transformers."""
    config = FAMILIES["llama-untied"].config(2, NUM_TOKENS)
    config.eos_token_id = None if place == "generation_config.json" else list(range(2, 42))
    teacher = make_model(tmp_path / "teacher", toy_tokenizer, config, seed=1)
    path = teacher / "generation_config.json"
    path.unlink()
    if place == "generation_config.json":
        path.write_text(json.dumps({"eos_token_id": list(range(2, 42))}))
    stop_ids = locate_model(str(teacher), "teacher").stop_token_ids()
    assert stop_ids == [0, *range(2, 42)]  # the tokenizer's is one of them
    dpkd(
        "cache-teacher", "--teacher", teacher, "--data", toy_data, "--out", tmp_path / "cache", "--template", "chat",
        "--engine", "transformers", "--device", "cpu", "--max-new-tokens", 12, "--top-k", 4, "--limit", 12,
    )  # fmt: skip
    cache = TeacherCache.open(tmp_path / "cache")
    assert cache.identities["generation"]["stop_token_ids"] == stop_ids
    rows = [shard.row(index) for _, shard in cache.scan(cache.shards()) for index in range(len(shard))]
    ended = {int(row.response_ids[-1]) for row in rows if row.finish_reason == "stop"}
    assert len(ended) > 1
    for row in rows:
        *before, last = row.response_ids.tolist()
        assert not set(before) & set(stop_ids)
        assert (last in stop_ids) == (row.finish_reason == "stop")
        assert row.finish_reason == "stop" or len(row.response_ids) == 12
    # the trained student, which has the tokenizer's files and its own generation config, stops at the same ids
    out = train(config_of(tmp_path / "run", cache.folder.where(""), teacher, steps=1))
    assert locate_model(str(out), "student").stop_token_ids() == stop_ids


def share_of_padding(location: Path) -> float:
    """Share of the kept entries that are no token."""
    cache = TeacherCache.open(location)
    ids = [
        token
        for _, shard in cache.scan(cache.shards())
        for index in range(len(shard))
        for token in shard.row(index).distributions.ids_E.tolist()  # type: ignore[union-attr]
    ]
    return sum(token >= NUM_TOKENS for token in ids) / len(ids)
