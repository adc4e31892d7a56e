"""The teacher's log-prob of any token, from the cached top of its distribution."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def cached_logprobs(
    token_T: Int[Tensor, " T"],
    entry_ids_TK: Int[Tensor, "T K"],
    entry_logprobs_TK: Float[Tensor, "T K"],
    entry_counts_T: Int[Tensor, " T"],
    log_remainder_T: Float[Tensor, " T"],
    vocab_size: int,
) -> tuple[Float[Tensor, " T"], Bool[Tensor, " T"]]:
    """log p of one token a position (nats), and whether it stands outside the kept entries (a miss).

    A hit is the cached entry. A miss gets the remainder spread evenly over the tokens outside:
    log remainder - log(V - K). Places beyond a position's count hold the id -1, which no token has.
    """
    match_TK = entry_ids_TK == token_T[:, None]
    miss_T = ~match_TK.any(dim=1)
    hit_T = torch.where(match_TK, entry_logprobs_TK, torch.zeros_like(entry_logprobs_TK)).sum(dim=1)
    outside_T = (vocab_size - entry_counts_T).clamp(min=1).to(log_remainder_T.dtype)
    return torch.where(miss_T, log_remainder_T - outside_T.log(), hit_T), miss_T
