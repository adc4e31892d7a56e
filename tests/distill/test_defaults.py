"""What a user gets without asking: defaults that distil, presets that pin what they mean, refused combinations."""

from __future__ import annotations

import json
import math
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    Starcoder2Config,
)

from dpkd.core.errors import UserError
from dpkd.distill.objectives.statistics import Positions, entropy_and_agreement
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.run.student_state import learning_rate_factor, turn_off_dropout
from dpkd.distill.training import train

PATHS = {"cache": "c", "student": "s", "out": "o"}


def parse(**options: Any) -> TrainConfig:
    return TrainConfig.parse(PATHS | options, where="here")


def test_the_default_compares_all_pairs_and_a_round_is_balanced_and_anchored() -> None:
    default = parse()
    assert (default.token_pairs, default.beta, default.weights) == ("all", 1.0, {"dpkd": 1.0})
    pairs = parse(level="sequence", round="r0")
    assert (pairs.weights, pairs.smoothing, pairs.origin) == ({"dpkd": 1.0, "kd": 1.0}, 0.5, "teacher")
    live = parse(level="sequence", student_samples="live", teacher_url=["http://127.0.0.1:1"])
    assert (live.weights, live.smoothing) == ({"dpkd": 1.0, "kd": 1.0}, 0.0)


def test_presets_pin_what_they_mean() -> None:
    paper = parse(preset="paper", round="r0", lm_data="text")
    assert paper.weights == {"dpkd": 1.0, "lm": 1.0}
    assert (paper.smoothing, paper.beta, paper.origin, paper.length_normalize) == (0.0, 1.0, "teacher", True)
    recommended = parse(preset="recommended")
    assert (recommended.objective, recommended.skew_alpha, recommended.origin) == ("skewed-forward-kl", 0.1, "teacher")
    assert parse(preset="recommended", skew_alpha=0.2).skew_alpha == 0.2
    code = parse(preset="released-code", lm_data="text")
    assert code.weights == {"dpkd": 0.5, "sft": 0.5, "lm": 0.5}
    assert (code.token_pairs, code.beta, code.smoothing, code.dropout) == ("argmax", 0.1, 0.0, True)


def test_a_preset_pins_its_options_over_the_file_below_it_and_flags_override_it() -> None:
    plain = tomllib.loads(parse(lm_data="text").to_toml())  # as a run keeps it: every option with its value
    code = TrainConfig.parse(TrainConfig.layered(plain, {"preset": "released-code"}), where="here")
    assert code == parse(preset="released-code", lm_data="text")
    own = TrainConfig.parse(TrainConfig.layered(plain, {"preset": "released-code", "beta": 0.3}), where="here")
    assert (own.beta, own.token_pairs) == (0.3, "argmax")
    # another preset, or none, takes back what the one of the file stood for, and no more
    ran = tomllib.loads(code.to_toml())
    saved = tomllib.loads(parse(preset="recommended", learning_rate=1e-3).to_toml())
    other = TrainConfig.parse(TrainConfig.layered(ran, saved), where="here")
    assert other == parse(preset="recommended", learning_rate=1e-3, lm_data="text")
    assert TrainConfig.parse(TrainConfig.layered(ran, {"preset": "none"}), where="here") == parse(lm_data="text")


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "paper", "round": "r0", "kd_weight": "none", "label_smoothing": "none", "lm_weight": 0},
        {"preset": "recommended", "objective": "dpkd", "skew_alpha": "none"},
        {"preset": "released-code", "sft_weight": "none", "lm_weight": "none", "student_samples": "none"},
        {"save_every": "none", "validation_examples": "none"},
    ],
)
def test_a_saved_file_gives_the_same_options_again(options: dict[str, Any]) -> None:
    config = parse(**options)
    assert TrainConfig.parse(tomllib.loads(config.to_toml()), where="here") == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "jsd", "beta": 0.1}, r"--beta goes with a preference as --objective \(jsd has --jsd-beta"),
        ({"objective": "sft", "beta": 0.1}, "--beta goes with a preference"),
        ({"objective": "jsd", "kd_weight": 0, "sft_weight": 1}, "--kd-weight 0 leaves nothing of --objective jsd"),
        ({"objective": "kd", "kd_weight": 0}, "--kd-weight 0 leaves nothing of --objective kd"),
        ({"objective": "seqkd", "sft_weight": 0, "kd_weight": 1}, "--sft-weight 0 leaves nothing of --objective seqkd"),
        ({"validate_every": 5, "validation_examples": 0}, "--validate-every needs --validation-examples of 1 or more"),
        ({"validate_every": 5, "follow": True}, "--validate-every needs a finished --cache"),
        ({"cache": None, "data": "d", "objective": "sft", "responses": "reference"}, "--responses chooses rows of a"),
        ({"objective": "kd", "round": "r0"}, "the student's own responses, and cross-entropy on them teaches nothing"),
        ({"sft_weight": 1.0, "round": "r0"}, "the student's own responses, and cross-entropy on them teaches nothing"),
        ({"objective": "ipo"}, "compares single tokens: give --token-pairs drawn or argmax"),
        (
            {"level": "sequence", "round": "r0", "best_metric": "reward_margin", "validation_examples": 2},
            "--best-metric reward_margin is best where a fixed round is overshot",
        ),
        (
            {"level": "sequence", "round": "r0", "best_metric": "loss", "validation_examples": 2},
            "--best-metric loss is best where a fixed round is overshot",
        ),
        ({"objective": "forward-kl", "skew_alpha": 0.2}, "--skew-alpha goes with a skewed divergence"),
        ({"token_pairs": "argmax", "skew_alpha": 0.2}, "--skew-alpha goes with a skewed divergence"),
        ({"teacher_floor": True}, "--teacher-floor goes with dpkd or dpop with --level sequence"),
        (
            {"objective": "simpo", "level": "sequence", "round": "r0", "length_normalize": False},
            "simpo, which always divides",
        ),
        ({"objective": "seqkd", "responses": "all"}, "--objective seqkd learns from the teacher's responses"),
    ],
    ids=str,
)
def test_what_would_train_on_the_wrong_thing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(**options)


ROUND = {"level": "sequence", "round": "r0"}


@pytest.mark.parametrize(
    ("key", "value", "reader"),
    [
        ("gamma", 1.0, ROUND | {"objective": "simpo"}),
        ("dpop_lambda", 1.0, {"objective": "dpop", "token_pairs": "drawn"}),
        ("jsd_beta", 0.2, {"objective": "jsd"}),
        ("akl_mu", 0.2, {"objective": "akl"}),
        ("ab_alpha", 0.5, {"objective": "alpha-beta"}),
        ("ab_beta", 0.5, {"objective": "alpha-beta"}),
        ("minillm_clip", 0.5, {"objective": "minillm", "round": "r0"}),
        ("skew_schedule", False, {"objective": "distillm2", "round": "r0"}),
        ("token_pairs", "drawn", {"objective": "dpkd"}),
        ("label_smoothing", 0.1, {"objective": "dpkd"}),
        ("length_normalize", False, ROUND),
        ("length_normalize", False, {"objective": "minillm", "round": "r0"}),
        ("pairing", "all", ROUND),
        ("tail", "renormalise", {"objective": "sft", "kd_weight": 0.5}),
        ("tail", "renormalise", {"token_pairs": "drawn"}),
        ("lm_length", 64, {"lm_data": "text"}),
    ],
    ids=str,
)
def test_an_option_that_nothing_reads_is_refused(key: str, value: Any, reader: dict[str, Any]) -> None:
    assert getattr(parse(**reader, **{key: value}), key) == value
    with pytest.raises(UserError, match=f"{key.replace('_', '-')} goes with .*: nothing else reads it"):
        parse(objective="sft", **{key: value})


def test_a_constant_of_0_is_not_refused() -> None:
    assert parse(objective="forward-kl", label_smoothing=0.0, skew_alpha=0.0, gamma=0.0).weights == {"kd": 1.0}


def test_seqkd_reads_teacher_responses_also_of_a_growing_cache() -> None:
    """A followed cache is read by the same property as a finished one."""
    assert parse(objective="seqkd", follow=True).origin == "teacher"
    assert parse(objective="forward-kl", follow=True).origin is None


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        OPTConfig(
            vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
            word_embed_proj_dim=16, max_position_embeddings=64, dropout=0.1, attention_dropout=0.1, layerdrop=0.3,
        ),
        BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.1),
        Starcoder2Config(
            vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, residual_dropout=0.1, embedding_dropout=0.1,
        ),
        MixtralConfig(
            vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.3,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_dropout_is_off_in_training_and_the_config_keeps_it(config: PretrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.arange(1, 40)[None]
    before, kept = [model(input_ids=ids).logits for _ in range(2)], model.config.to_json_string()
    assert not torch.equal(*before)
    turn_off_dropout(model, "student")
    assert torch.equal(*(model(input_ids=ids).logits for _ in range(2)))
    assert model.training
    assert model.config.to_json_string() == kept


def test_a_family_whose_dropout_stays_on_is_refused() -> None:
    """Falcon's layers read the config, which is saved with the student and must stay as it is."""
    config = FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.3)
    with pytest.raises(UserError, match=r"dropout.*stays on.*in its config\.json.*--dropout"):
        turn_off_dropout(AutoModelForCausalLM.from_config(config), "student")


def test_the_first_step_learns_and_the_warm_up_ends_at_the_peak() -> None:
    factors = [learning_rate_factor(step, 20, parse(warmup_ratio=0.2)) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert all(one > two > 0 for one, two in pairwise(factors[4:]))
    assert math.isclose(factors[12], 0.5)
    assert learning_rate_factor(0, 1, parse(warmup_ratio=0.0)) == 1.0


def test_runs_on_student_samples_are_validated_on_the_teachers_rows(
    tmp_path: Path, toy_cache: Path, toy_student: Path
) -> None:
    """Where they start, a run on the teacher's prefixes and one on the student's own measure the same KL."""
    common: dict[str, Any] = {
        "cache": str(toy_cache), "student": str(toy_student), "steps": 1, "batch_size": 4, "device": "cpu",
        "validation_examples": 4, "responses": "teacher", "objective": "forward-kl",
    }  # fmt: skip
    starts = []
    for name, options in (("teacher", {}), ("student", {"round": "r0"})):
        run = train(TrainConfig(out=tmp_path / name, **(common | options)))
        start, _ = (json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines())
        starts.append((start["kld"], start["rkld"], start["top1_agreement"], start["chosen_length"]))
    assert starts[0] == starts[1]


def test_the_entropy_of_a_token_that_is_ruled_out_is_a_number() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    at = Positions(logits, logits.logsumexp(1), {}, 3)
    assert math.isclose(float(entropy_and_agreement(at)["entropy"]), math.log(2), rel_tol=1e-6)
