"""The chunked scorer against full logits, for several families of models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, OPTConfig, PretrainedConfig

from dpkd.core.errors import UserError
from dpkd.core.models import locate_model
from dpkd.distill.losses.preference import PreferenceOptions
from dpkd.distill.objectives.preference_terms import AllPairs
from dpkd.distill.objectives.statistics import (
    Outcomes,
    Positions,
    argmax_pair,
    entropy_and_agreement,
    target_logprob,
)
from dpkd.distill.objectives.student_forward import StudentScorer, check_head, head_logits

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0, embd_pdrop=0),
    "opt": OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=16, max_position_embeddings=64, dropout=0.0),
    "llama-untied": LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=False),
    "gemma2-softcapped": Gemma2Config(
        **SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5
    ),
}


def entropy(at: Positions) -> dict[str, torch.Tensor]:
    return {"entropy": entropy_and_agreement(at)["entropy"]}


def score(scorer: StudentScorer, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = ("input_ids_BS", "row_T", "predict_T")
    fields = {name.removesuffix("_T"): value for name, value in inputs.items() if name not in (*names, "mask_BS")}
    return scorer(*(inputs[name] for name in names), fields, (target_logprob, argmax_pair, entropy))  # type: ignore[no-any-return]


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 90, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    rows = torch.tensor([0] * 5 + [1] * 2 + [2] * 4)
    predict = torch.tensor([6, 7, 8, 9, 10, 6, 7, 3, 4, 5, 6])
    return {
        "input_ids_BS": ids,
        "mask_BS": mask,
        "row_T": rows,
        "predict_T": predict,
        "target_id_T": ids[rows, predict + 1],
        "entry_ids_T": torch.randint(1, 90, (11, 2), generator=generator),
    }


def test_statistics_are_in_float32_under_autocast(toy_student: Path) -> None:
    """The same hidden states give the same values: sums over pairs and over the vocabulary are not rounded."""
    torch.manual_seed(0)
    scorer = StudentScorer(locate_model(str(toy_student), "student").load("float32"), num_tokens=600)
    hidden_TD = torch.randn(6, scorer.model.config.hidden_size)
    ids_TK = torch.stack([torch.randperm(600)[:16] for _ in range(6)])
    log_p_TN = torch.log_softmax(torch.randn(6, 17), dim=1)
    fields = {
        "entry_ids": ids_TK, "entry_logprobs": log_p_TN[:, :16], "entry_counts": torch.full((6,), 16),
        "log_tail": log_p_TN[:, 16], "target_id": ids_TK[:, 3],
    }  # fmt: skip
    (all_pairs,) = AllPairs(options=PreferenceOptions(beta=1.0), skew=0.0, outcomes=Outcomes("bucket", 600)).needs
    statistics = (target_logprob, all_pairs, entropy_and_agreement)
    expected = scorer.evaluate(hidden_TD, fields, statistics)
    with torch.autocast("cpu", torch.bfloat16):
        found = scorer.evaluate(hidden_TD, fields, statistics)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 7, 31])
def test_chunks_equal_full_logits_in_value_and_gradient(family: str, chunk: int) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    inputs = batch()
    check_head(model, family)

    full = torch.log_softmax(
        model(input_ids=inputs["input_ids_BS"], attention_mask=inputs["mask_BS"]).logits.float(), dim=-1
    )[inputs["row_T"], inputs["predict_T"]]
    own = full.argmax(dim=1)
    likeliest = inputs["entry_ids_T"][:, 0]
    expected = [full.gather(1, ids[:, None])[:, 0] for ids in (inputs["target_id_T"], likeliest)]
    expected.append(full.gather(1, own[:, None])[:, 0])
    weights = torch.linspace(-1, 1, 11)
    sum((value * weights).sum() for value in expected).backward()  # type: ignore[union-attr]
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }

    model.zero_grad()
    scores = score(StudentScorer(model, num_tokens=97, logits_chunk=chunk), inputs)
    found = [scores["target"], scores["chosen"], scores["rejected"]]
    assert scores["rejected_id"].tolist() == own.tolist()
    assert torch.allclose(scores["entropy"], -(full.exp() * full).sum(dim=1), atol=1e-5)
    for one, two in zip(found, expected, strict=True):
        assert torch.allclose(one, two, atol=1e-5)
    sum((value * weights).sum() for value in found).backward()  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert torch.allclose(parameter.grad, gradients[name], atol=1e-5), name


def test_padding_of_the_vocabulary_is_never_the_students_token() -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES["llama-untied"])
    scores = score(StudentScorer(model, num_tokens=3, logits_chunk=64), batch())
    assert int(scores["rejected_id"].max()) < 3


def test_an_unknown_change_of_the_logits_is_refused(toy_student: Path) -> None:
    model = locate_model(str(toy_student), "student").load("float32")
    forward = model.forward

    def scaled(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = scaled  # type: ignore[method-assign]
    with pytest.raises(UserError, match="changes its logits in a way that is not known here"):
        check_head(model, "toy")


def test_padded_sequences_need_no_attention_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask keeps the fast attention kernels from running, and each layer keeps a copy of it for its gradient."""
    model = AutoModelForCausalLM.from_config(FAMILIES["llama-untied"])
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*states: torch.Tensor, **options: object) -> torch.Tensor:
        calls.append((states[1].shape[1], options))
        return attention(*states, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    score(StudentScorer(model, num_tokens=97), batch())
    assert len(calls) == 2
    for heads, options in calls:
        assert (heads, options["attn_mask"], options["is_causal"]) == (2, None, True)  # 2 of 4 heads: none was copied


def test_a_model_whose_tokens_see_padding_is_refused(toy_student: Path) -> None:
    model = locate_model(str(toy_student), "student").load("float32")
    decoder = model.get_decoder()
    forward = decoder.forward

    def mixed(*, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: object) -> object:
        """As experts with a limited number of places do, each token depends on how many there are in all."""
        output = forward(input_ids=input_ids, attention_mask=attention_mask, **options)
        num_tokens = input_ids.numel() if attention_mask is None else int(attention_mask.sum())
        output.last_hidden_state = output.last_hidden_state * (1 + 1 / num_tokens)
        return output

    decoder.forward = mixed
    with pytest.raises(UserError, match="changes its logits in a way that is not known here"):
        check_head(model, "toy")


def test_soft_capping_is_applied() -> None:
    model = AutoModelForCausalLM.from_config(FAMILIES["gemma2-softcapped"])
    assert float(head_logits(model, 100 * torch.randn(2, 32)).detach().abs().max()) <= 0.5
