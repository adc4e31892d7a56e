"""The losses of one training step over all rows of a cache, from full logits by plain torch.

Written after the formulas, not after `dpkd.distill`, of which nothing but the options is read. Each row is a forward
pass of its own in float64 without padding; logits are taken at full width; sums run over single positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpkd.distill.options.train import TrainConfig
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.rows import CachedRow

Entries = list[dict[int, float]]


def step_losses(config: TrainConfig) -> dict[str, float]:
    """Every loss term, their weighted sum and the norm of its gradient, for a first step that reads every row once."""
    assert config.cache is not None
    model = AutoModelForCausalLM.from_pretrained(config.student).double().eval()
    cache = TeacherCache.open(config.cache)
    terms: dict[str, list[Tensor]] = {"dpkd": [], "sft": [], "kd": []}
    for chosen, rejected in read_rows(cache, config.round):
        log_q_TV = full_logprobs(model, chosen)
        log_p_T = [{**entries, -1: rest} for entries, rest in entries_of(chosen)]
        for position, token in enumerate(chosen.response_ids.tolist()):
            log_q_V = log_q_TV[position]
            log_p = merged(log_p_T[position], len(log_q_V))
            terms["sft"].append(-log_q_V[token])
            terms["kd"].append(forward_kl(log_p, log_q_V))
            if config.level == "token":
                terms["dpkd"].append(token_loss(config, model, cache, log_p, log_q_V))
        if config.level == "sequence":
            assert rejected is not None
            terms["dpkd"].append(sequence_loss(config, log_q_TV, full_logprobs(model, rejected), chosen, rejected))
    means = {name: torch.stack(values).mean() for name, values in terms.items()}
    weights = {"dpkd": config.dpkd_weight or 1.0, "sft": config.sft_weight or 0.0, "kd": config.kd_weight or 0.0}
    total = torch.stack([weights[name] * means[name] for name in weights]).sum()
    total.backward()
    squares = [parameter.grad.pow(2).sum() for parameter in model.parameters() if parameter.grad is not None]
    found = {f"loss_{name}": float(value.detach()) for name, value in means.items()}
    return found | {"loss": float(total.detach()), "grad_norm": math.sqrt(float(torch.stack(squares).sum()))}


def read_rows(cache: TeacherCache, round_name: str | None) -> Iterator[tuple[CachedRow, CachedRow | None]]:
    """Every row of the cache, with the student's response of the round to the same example."""
    for record in cache.shards():
        shard = cache.read(record)
        students = None if round_name is None else cache.read_round(cache.round(round_name), record)
        for index in range(len(shard)):
            student = None if students is None else students.row(students.index_of[shard.key(index)])
            yield shard.row(index), student


def full_logprobs(model: Any, row: CachedRow) -> Tensor:
    """log q over the whole width of the logits, at each response position of `row`."""
    ids = [*row.prompt_ids.tolist(), *row.response_ids.tolist()]
    log_q_SV = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
    # position i predicts token i + 1
    return log_q_SV[len(row.prompt_ids) - 1 : len(ids) - 1]


def entries_of(row: CachedRow) -> Iterator[tuple[dict[int, float], float]]:
    """The kept entries (id: log p, likeliest first) and the log of the mass outside, at each position."""
    top = row.distributions
    assert top is not None
    start = 0
    for count, rest in zip(top.counts_T.tolist(), top.log_tail_T.tolist(), strict=True):
        end = start + count
        yield dict(zip(top.ids_E[start:end].tolist(), top.logprobs_E[start:end].tolist(), strict=True)), rest
        start = end


def merged(log_p: dict[int, float], num_logits: int) -> dict[int, float]:
    """`log_p` with the ids that the student has no logit for added to the tail mass, which has the key -1."""
    inside = {token: value for token, value in log_p.items() if 0 <= token < num_logits}
    rest = sum(math.exp(value) for token, value in log_p.items() if token not in inside)
    return {**inside, -1: math.log(rest) if rest else -math.inf}


def forward_kl(log_p: dict[int, float], log_q_V: Tensor) -> Tensor:
    """KL(p || q) over the kept entries and one outcome for everything else, p brought to a sum of 1."""
    tokens = [token for token in log_p if token >= 0]
    outside_V = torch.ones(len(log_q_V), dtype=torch.bool)
    outside_V[tokens] = False
    q = torch.cat([log_q_V[tokens].exp(), log_q_V[outside_V].exp().sum()[None]])
    p = torch.tensor([*(log_p[token] for token in tokens), log_p[-1]], dtype=torch.float64).exp()
    p = p / p.sum()
    inside = p > 0
    return (p[inside] * (p[inside] / q[inside]).log()).sum()


def token_loss(
    config: TrainConfig, model: Any, cache: TeacherCache, log_p: dict[int, float], log_q_V: Tensor
) -> Tensor:
    """-log sigma(beta [log q(y_t)/p(y_t) - log q(y_s)/p(y_s)]) of all pairs, or of the two arg-maxes."""
    if config.token_pairs == "all":
        return all_pairs_loss(config.beta, log_p, log_q_V)
    num_tokens = cache.identities["tokenizer"]["num_tokens"]
    teacher_token = next(iter(log_p))
    student_token = int(log_q_V[:num_tokens].argmax())
    num_outside = min(cache.vocab_size, len(log_q_V)) - (len(log_p) - 1)
    # a token outside the kept entries has an even share of the mass outside
    log_p_student = log_p.get(student_token, log_p[-1] - math.log(max(num_outside, 1)))
    delta = (log_q_V[teacher_token] - log_p[teacher_token]) - (log_q_V[student_token] - log_p_student)
    return (1 + (-config.beta * delta).exp()).log()


def all_pairs_loss(beta: float, log_p: dict[int, float], log_q_V: Tensor) -> Tensor:
    """The expected loss of a token of the teacher and one of the student, pair by pair, the tail as one token."""
    tokens = [token for token in log_p if token >= 0]
    in_tail_V = torch.ones(len(log_q_V), dtype=torch.bool)
    in_tail_V[tokens] = False
    q = torch.cat([log_q_V[tokens].exp(), log_q_V[in_tail_V].exp().sum()[None]])
    p = torch.tensor([*(log_p[token] for token in tokens), log_p[-1]], dtype=torch.float64).exp()
    p = p / p.sum()
    ratio = (q / p).log()
    loss = torch.zeros((), dtype=torch.float64)
    for chosen in range(len(p)):
        margins = beta * (ratio[chosen] - ratio)
        loss = loss + p[chosen] * (q * (1 + (-margins).exp()).log()).sum()
    return loss


def sequence_loss(
    config: TrainConfig, chosen_TV: Tensor, rejected_TV: Tensor, chosen: CachedRow, rejected: CachedRow
) -> Tensor:
    """Eq. 9: -log sigma(r(y_t) - r(y_s)), r = beta/|y| log q(y)/p(y), with a share of it for the reversed pair."""
    rewards = []
    for log_q_TV, row in ((chosen_TV, chosen), (rejected_TV, rejected)):
        ids = row.response_ids.tolist()
        log_q = torch.stack([log_q_TV[position, token] for position, token in enumerate(ids)]).sum()
        rewards.append(config.beta / len(ids) * (log_q - float(row.response_logprobs.astype("float64").sum())))
    forwards, reversed_ = ((1 + (sign * (rewards[1] - rewards[0])).exp()).log() for sign in (1, -1))
    return (1 - config.smoothing) * forwards + config.smoothing * reversed_


@torch.no_grad()
def largest_gap_to_teacher(cache_path: Path, teacher: Path, round_name: str | None) -> tuple[float, float]:
    """How far the cached log-probs of responses, and those of the kept entries, are from the teacher's full logits."""
    model = AutoModelForCausalLM.from_pretrained(teacher).double().eval()
    cache = TeacherCache.open(cache_path)
    of_responses = of_entries = 0.0
    for pair in read_rows(cache, round_name):
        for row in pair:
            if row is None:
                continue
            log_p_TV = full_logprobs(model, row)
            for position, (entries, _) in enumerate(entries_of(row)):
                token = int(row.response_ids[position])
                gap = float(log_p_TV[position, token]) - float(row.response_logprobs[position])
                of_responses = max(of_responses, abs(gap))
                ranked = log_p_TV[position].topk(len(entries)).values.tolist()
                for (kept, value), best in zip(entries.items(), ranked, strict=True):
                    of_entries = max(of_entries, abs(float(log_p_TV[position, kept]) - value), abs(best - value))
    return of_responses, of_entries
