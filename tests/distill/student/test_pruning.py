"""Pruned layers and neurons: what is kept computes the same as before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
)

from dpkd.core.errors import UserError
from dpkd.distill.batches.batch import Batch
from dpkd.distill.batches.collate import collate
from dpkd.distill.rows.row import TrainingRow
from dpkd.distill.student.layers import in_words, keep_layers, masked_inputs, named_layers, spread_layers
from dpkd.distill.student.neurons import mlps_of, neuron_masks, neuron_sizes, prune_mlps
from dpkd.teacher_cache.store.rows import CachedRow

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2}
GATED = SMALL | {"intermediate_size": 32, "num_key_value_heads": 1}
FAMILIES = {
    "llama, tied": LlamaConfig(**GATED, tie_word_embeddings=True),
    "llama, untied, biases": LlamaConfig(**GATED, tie_word_embeddings=False, mlp_bias=True, attention_bias=True),
    "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=6, n_head=2),
    "gpt2, n_inner": GPT2Config(vocab_size=50, n_embd=16, n_layer=6, n_head=2, n_inner=24, tie_word_embeddings=False),
    "opt": OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16),
    "qwen2": Qwen2Config(**GATED),
    "gemma": GemmaConfig(**GATED, head_dim=8),
    "gemma3": Gemma3TextConfig(**GATED, head_dim=8),
}
IDS = torch.arange(1, 12)[None]


def made(family: str) -> PreTrainedModel:
    """A model of the family in which no weight or bias is 0 by its initialisation."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def batch(*lengths: tuple[int, int]) -> Batch:
    """Rows of so many prompt and response tokens, the ids all different."""
    none, start, rows = np.zeros(0, np.float32), 1, []
    for prompt, response in lengths:
        ids = np.arange(start, start + prompt + response)
        start += len(ids)
        rows.append(TrainingRow(CachedRow("r", 0, "teacher", "stop", ids[:prompt], ids[prompt:], none, None)))
    return collate(rows, with_distributions=False)


def test_layers_are_spread_from_first_to_last() -> None:
    assert spread_layers(30, 8) == [0, 4, 8, 12, 17, 21, 25, 29]
    assert spread_layers(12, 1) == [0]
    assert spread_layers(4, 4) == [0, 1, 2, 3]


def test_which_layers_are_kept() -> None:
    assert named_layers(30, 3, "spread") == [0, 14, 29]
    assert named_layers(30, 3, "first") == [0, 1, 2]
    assert named_layers(30, 3, "last") == [27, 28, 29]
    assert named_layers(30, 3, (0, 3, 7)) == [0, 3, 7]
    assert in_words([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    with pytest.raises(UserError, match="no such layer: found layer 30 in --keep, expected layers 0 to 29"):
        named_layers(30, 2, (0, 30))


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_nothing_keeps_the_logits(family: str) -> None:
    model = made(family)
    assert torch.equal(logits(keep_layers(model, range(6))), logits(model))
    sizes_LW = neuron_sizes(model, [batch((4, 5))])
    assert torch.equal(logits(prune_mlps(model, sizes_LW.shape[1], sizes_LW)), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_layers_without_output_keeps_the_logits(family: str) -> None:
    model = made(family)
    stack = model.get_submodule(mlps_of(model)[0].output.split(".0.")[0])
    for layer in (1, 4):  # a layer whose last weights are 0 adds 0 to what passes through it
        for name, parameter in stack[layer].named_parameters():
            if name.split(".")[-2] in ("o_proj", "out_proj", "c_proj", "down_proj", "fc2"):
                parameter.data.zero_()
            if "post_attention_layernorm" in name and "gemma3" in family:
                parameter.data.fill_(-1.0)  # Gemma scales by 1 + weight
    student = keep_layers(model, [0, 2, 3, 5])
    assert student.config.get_text_config().num_hidden_layers == 4
    torch.testing.assert_close(logits(student), logits(model), rtol=0, atol=1e-5)


def kill_neurons(model: PreTrainedModel, dead: list[int]) -> None:
    """Of the neurons `dead`, let every second one say nothing and the others write nothing."""
    for mlp in mlps_of(model):
        for name, neurons in ((mlp.output, dead[::2]), *((name, dead[1::2]) for name in mlp.inputs)):
            module = model.get_submodule(name)
            weight, bias = module.weight.data, getattr(module, "bias", None)
            # [out, in] for Linear, [in, out] for Conv1D: neurons are the output module's inputs
            columns = isinstance(module, nn.Linear) == (name == mlp.output)
            (weight.T if columns else weight)[neurons] = 0
            if bias is not None and name != mlp.output:
                bias.data[neurons] = 0


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_dead_neurons_keeps_the_logits(family: str, tmp_path: Path) -> None:
    model = made(family)
    dead = [0, 3, 4, 9, 15, 21]
    kill_neurons(model, dead)
    width = mlps_of(model)[0].width
    # the tokens on which logits are compared are among them: some neurons of a ReLU are silent on any few tokens
    sizes_LW = neuron_sizes(model, [batch((5, 6), (2, 3)), batch((3, 3))])
    assert (sizes_LW[:, dead] == 0).all()
    assert (sizes_LW > 0).float().mean() > 0.5
    student = prune_mlps(model, width - len(dead), sizes_LW)
    assert mlps_of(student)[0].width == width - len(dead)
    torch.testing.assert_close(logits(student), logits(model), rtol=0, atol=1e-5)
    # the model that only switches neurons off computes what its pruned copy does
    narrow = prune_mlps(model, width // 2, sizes_LW)
    with masked_inputs(neuron_masks(model, width // 2, sizes_LW)):
        torch.testing.assert_close(logits(narrow), logits(model), rtol=0, atol=1e-5)
    # as a checkpoint: the same logits, and the head tied or not as in the teacher
    student.save_pretrained(tmp_path / "s")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    assert torch.equal(logits(loaded), logits(student))
    head, embedding = (get().weight.data_ptr() for get in (loaded.get_output_embeddings, loaded.get_input_embeddings))
    assert (head == embedding) == bool(model.config.tie_word_embeddings)


def test_sizes_are_the_mean_activation_times_the_norm_of_the_outgoing_weights() -> None:
    model = made("llama, untied, biases")
    rows = [(4, 5), (2, 3)]
    heard: list[Tensor] = []
    mlp = model.model.layers[2].mlp
    handle = mlp.register_forward_hook(lambda module, arguments, output: heard.append(arguments[0].detach()))
    sizes_LW = neuron_sizes(model, [batch(*rows)])
    handle.remove()
    x_ND = torch.cat(
        [hidden_SD[: prompt + response] for hidden_SD, (prompt, response) in zip(heard[0], rows, strict=True)]
    )
    gate_NW = x_ND @ mlp.gate_proj.weight.T + mlp.gate_proj.bias
    up_NW = x_ND @ mlp.up_proj.weight.T + mlp.up_proj.bias
    neurons_NW = gate_NW / (1 + torch.exp(-gate_NW)) * up_NW
    expected_W = neurons_NW.abs().mean(dim=0) * (mlp.down_proj.weight**2).sum(dim=0).sqrt()
    torch.testing.assert_close(sizes_LW[2], expected_W)
    # the same rows in batches of their own: padding does not count
    alone_LW = neuron_sizes(model, [batch(rows[0]), collate_second(rows)])
    torch.testing.assert_close(alone_LW, sizes_LW)


def collate_second(rows: list[tuple[int, int]]) -> Batch:
    """Only the second of `rows`, with the same ids as next to the first."""
    both = batch(*rows)
    length = sum(rows[1])
    ids = both.input_ids_BS[1, :length].numpy()
    row = CachedRow("r", 0, "teacher", "stop", ids[: rows[1][0]], ids[rows[1][0] :], np.zeros(0, np.float32), None)
    return collate([TrainingRow(row)], with_distributions=False)


def test_the_largest_neurons_are_kept_in_their_order() -> None:
    model = made("gpt2")
    sizes_LW = torch.zeros(6, 64)
    sizes_LW[:, [50, 7, 21]] = torch.tensor([3.0, 1.0, 2.0])
    student = prune_mlps(model, 3, sizes_LW)
    ours, theirs = student.transformer.h[5].mlp, model.transformer.h[5].mlp
    assert torch.equal(ours.c_fc.weight, theirs.c_fc.weight[:, [7, 21, 50]])
    assert torch.equal(ours.c_fc.bias, theirs.c_fc.bias[[7, 21, 50]])
    assert torch.equal(ours.c_proj.weight, theirs.c_proj.weight[[7, 21, 50]])
    assert torch.equal(ours.c_proj.bias, theirs.c_proj.bias)
    assert student.config.n_inner == 3


def test_more_neurons_than_the_teacher_has_is_an_error() -> None:
    model = made("opt")
    with pytest.raises(UserError, match="more neurons than the teacher's: found --mlp-width 33, expected at most 32"):
        prune_mlps(model, 33, torch.zeros(6, 32))


def test_families_whose_mlps_are_not_known() -> None:
    experts = AutoModelForCausalLM.from_config(MixtralConfig(**GATED, num_local_experts=2))
    with pytest.raises(
        UserError, match=r"MLPs of the model type mixtral are unknown.* found 0 MLPs of widths \[\] in 6"
    ):
        mlps_of(experts)
    fixed = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2))
    with pytest.raises(UserError, match=r"type bloom are unknown.* widths \[64\] .* no width in the config"):
        mlps_of(fixed)
