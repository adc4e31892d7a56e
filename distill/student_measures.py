"""A student held against a cache before training: perplexity of its responses, KL to its distributions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dpkd.distill.batches import Batch, BatchOrder, TrainingRow, collate
from dpkd.distill.readings import distribution_fields, measured
from dpkd.distill.scoring import Positions, StudentScorer, check_head
from dpkd.distill.sources import CacheRows, check_positions
from dpkd.distill.vocabulary import narrowed
from dpkd.teacher_cache.models import ModelSource
from dpkd.teacher_cache.reader import TeacherCache

_BATCH_SIZE = 8
_LOGITS_CHUNK = 1024
_LARGEST_EXPONENT = 700.0  # exp of more is no float64; a model that far off is told apart by its log-probs


def sample_rows(cache: TeacherCache, num_rows: int) -> list[TrainingRow]:
    """`num_rows` rows of `cache`, or all where it has fewer: always the same ones, shuffled over shards."""
    rows = CacheRows(cache, cache.shards(), None)
    sizes = rows.group_sizes
    places = BatchOrder(sizes, seed=0, global_batch_size=min(num_rows, sum(sizes))).rows_of(0)
    return [rows.row(*place) for place in places]


def batches_of(rows: list[TrainingRow], device: torch.device, *, with_distributions: bool = False) -> Iterator[Batch]:
    """`rows` in batches on `device`, in order."""
    for start in range(0, len(rows), _BATCH_SIZE):
        yield collate(rows[start : start + _BATCH_SIZE], with_distributions=with_distributions).to(device)


@torch.no_grad()
def measure_student(
    student: ModelSource, model: nn.Module, cache: TeacherCache, num_rows: int, device: torch.device
) -> dict[str, Any]:
    """Means over the response tokens (EOS counted) of at most `num_rows` rows of `cache`.

    `perplexity` of the cached responses under the student; `kl`, KL(teacher || student) in nats to the cached
    distributions, tokens outside the kept entries taken as one bucket (a lower bound; None where the cache keeps none);
    `top1_agreement`, the share of tokens at which both find the same one likeliest. Raises `UserError` for a student
    whose positions end before the rows do, or whose logits are not numbers.
    """
    rows = sample_rows(cache, num_rows)
    longest = max(len(row.chosen.prompt_ids) + len(row.chosen.response_ids) for row in rows)
    check_positions(longest, student.max_positions, where=student.name)
    model = model.to(device).eval()
    check_head(model, student.name)
    scorer = StudentScorer(model, num_tokens=len(student.tokenizer), logits_chunk=_LOGITS_CHUNK)
    sums: dict[str, float] = {}
    num_tokens = 0
    for wide_batch in batches_of(rows, device, with_distributions=cache.top_k > 0):
        batch = narrowed(wide_batch, student.vocab_size)
        fields = {"target": batch.target_T} | distribution_fields(batch)
        values = scorer(batch.input_ids_BS, batch.attention_mask_BS, batch.row_T, batch.predict_T, fields, _read)
        num_tokens += batch.num_positions
        for name, value_T in values.items():
            sums[name] = sums.get(name, 0.0) + float(value_T.double().sum())
    means = {name: value / num_tokens for name, value in sums.items()}
    return {
        "rows": len(rows),
        "tokens": num_tokens,
        "perplexity": math.exp(min(-means["target"], _LARGEST_EXPONENT)),
        "kl": means.get("kld"),
        "top1_agreement": means.get("agrees"),
    }


def _read(at: Positions) -> dict[str, Tensor]:
    return {"target": at.logprob(at.fields["target"])} | measured(at)
