"""A model measured on a cache: perplexity of its responses, divergences from its distributions, implicit rewards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpkd.core.devices import choose_device
from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource, locate_model
from dpkd.core.progress import Progress
from dpkd.core.prompts.templates import PromptEncoder
from dpkd.distill.batches.batch import Batch, narrowed
from dpkd.distill.batches.collate import collate
from dpkd.distill.batches.order import BatchOrder
from dpkd.distill.losses.preference import sum_by_row
from dpkd.distill.objectives.statistics import (
    batch_fields,
    distance_from_teacher,
    entropy_and_agreement,
    target_logprob,
)
from dpkd.distill.objectives.student_forward import StudentScorer, check_head
from dpkd.distill.rows.row import TrainingRow
from dpkd.distill.rows.sources import CacheRows, check_positions
from dpkd.teacher_cache.store.reader import TeacherCache

_BATCH_SIZE = 8
_LARGEST_EXPONENT = 700.0  # exp of more overflows float64


def sample_rows(cache: TeacherCache, num_rows: int) -> list[TrainingRow]:
    """`num_rows` rows of `cache`, or all if it has fewer: the same ones at every call, spread over its shards."""
    rows = CacheRows(cache, cache.shards())
    sizes = rows.group_sizes
    order = BatchOrder(sizes, seed=0, global_batch_size=min(num_rows, sum(sizes)))
    return [rows.row(*row_index) for row_index in order.rows_of(0)]


def batches_of(rows: list[TrainingRow], device: torch.device, *, with_distributions: bool = False) -> Iterator[Batch]:
    """`rows` in batches on `device`, in order."""
    for start in range(0, len(rows), _BATCH_SIZE):
        yield collate(rows[start : start + _BATCH_SIZE], with_distributions=with_distributions).to(device)


def measure_model(
    path: str, cache: str | Path, *, num_rows: int, beta: float = 0.1, device: str = "auto", dtype: str = "float32"
) -> dict[str, Any]:
    """Metrics (`summary`) of the checkpoint `path` (directory or hub name) on at most `num_rows` rows of `cache` (path
    or URL).

    `device` is auto, cpu or cuda. Raises `UserError` if the model or the cache cannot be read, if the model has another
    tokenizer or prompt template than the cache, and the errors of `batch_measures`.
    """
    student, teacher_cache = locate_model(path, "model"), TeacherCache.open(cache)
    check_same_prompts(student, teacher_cache)
    values = row_measures(student, student.load(dtype), teacher_cache, num_rows, choose_device(device))
    return summary(values, beta)


def check_same_prompts(model: ModelSource, cache: TeacherCache) -> None:
    """Raise `UserError` unless `model` has the cache's tokenizer and prompt template.

    The template is the one in its `dpkd.json`; of a checkpoint without that file, the one of its tokenizer.
    """
    cache.check_tokenizer(model, "model")
    expected = cache.identities["template"]
    actual = (
        model.trained_template() or PromptEncoder(model.tokenizer, expected["name"], expected.get("args")).identity()
    )
    if (actual["name"], actual["sha256"]) != (expected["name"], expected["sha256"]):
        raise UserError(
            "the model's prompt template is not the cache's",
            found=f"{actual['name']} (sha256 {actual['sha256'][:12]}) of {model.name}",
            expected=f"{expected['name']} (sha256 {expected['sha256'][:12]})",
            where=cache.folder,
            advice="Give a model that was trained with the cache's template, or another cache",
        )


def summary(sums: dict[str, np.ndarray], beta: float = 0.1) -> dict[str, Any]:
    """Metrics of a model from the values of `batch_measures`, in nats.

    Means over response tokens, EOS included: `perplexity` of the cached responses; `kl` and `rkld`, KL(teacher ||
    student) and KL(student || teacher), lower bounds because all tokens that the cache does not keep count as one
    outcome; `top1_agreement`, the share of tokens where both have the same most likely token. Means over rows:
    `kld_first` and `rkld_first`, the divergences at the first response token; `reward`, beta/|y| log q(y)/p(y) of the
    cached response (Eq. 29 divided as in Eq. 9); `reward_sum`, the same without the division. Metrics that need
    distributions, or the teacher's log-probs of its responses, are None if the cache has none.
    """
    num_tokens_N = sums["tokens"]
    knows_responses = "teacher_nll" in sums
    log_ratio_N = sums["teacher_nll"] - sums["nll"] if knows_responses else np.zeros(0)  # log q(y)/p(y)

    def mean(name: str, weights_N: np.ndarray | None = None) -> float | None:
        if name not in sums:
            return None
        return float(sums[name].sum() / (len(num_tokens_N) if weights_N is None else weights_N.sum()))

    return {
        "rows": len(num_tokens_N),
        "tokens": int(num_tokens_N.sum()),
        "perplexity": math.exp(min(sums["nll"].sum() / num_tokens_N.sum(), _LARGEST_EXPONENT)),
        "kl": mean("kld", num_tokens_N),
        "rkld": mean("rkld", num_tokens_N),
        "kld_first": mean("kld_first"),
        "rkld_first": mean("rkld_first"),
        "top1_agreement": mean("top1_agreement", num_tokens_N),
        "beta": beta,
        "reward": float((beta * log_ratio_N / num_tokens_N).mean()) if knows_responses else None,
        "reward_sum": float((beta * log_ratio_N).mean()) if knows_responses else None,
    }


def row_measures(
    student: ModelSource, model: nn.Module, cache: TeacherCache, num_rows: int, device: torch.device
) -> dict[str, np.ndarray]:
    """`batch_measures` of at most `num_rows` rows of `cache`, in the order of `sample_rows`."""
    rows = sample_rows(cache, num_rows)
    return batch_measures(
        student, model.to(device), batches_of(rows, device, with_distributions=cache.top_k > 0), len(rows)
    )


@torch.no_grad()
def batch_measures(
    student: ModelSource, model: nn.Module, batches: Iterable[Batch], num_rows: int
) -> dict[str, np.ndarray]:
    """The values behind `summary` by name: one float64 a row, in the order of `batches`.

    `tokens` is the length of the response, EOS included. Sums over it, in nats: `nll` and, where the rows know it,
    `teacher_nll`, -log q(y) and -log p(y); with distributions also `kld`, `rkld` and `top1_agreement`. `kld_first` and
    `rkld_first` are values at the first token. Batches are on the model's device.
    `num_rows`, rows in all batches, is for the progress shown.

    Raises `UserError` if a row is longer than the student's positions, or if the student's logits are not finite.
    """
    check_head(model.eval(), student.name)
    scorer = StudentScorer(model, num_tokens=len(student.tokenizer))
    parts: list[dict[str, Tensor]] = []
    with Progress("rows of the cache", num_rows, "rows") as progress:
        for wide_batch in batches:
            longest = int(wide_batch.attention_mask_BS.sum(dim=1).max())
            check_positions(longest, student.max_positions, where=student.name)
            batch = narrowed(wide_batch, student.vocab_size)
            statistics = (target_logprob, distance_from_teacher, entropy_and_agreement)
            values = scorer(**batch.sequences, fields=batch_fields(batch), statistics=statistics)
            parts.append(_of_rows(batch, values))
            progress.advance(batch.num_rows)
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


def _of_rows(batch: Batch, values: dict[str, Tensor]) -> dict[str, Tensor]:
    values = values | {"nll": -values["target"]}
    if batch.teacher_logprob_T is not None:  # a cache of another program's rows may not know them
        values["teacher_nll"] = -batch.teacher_logprob_T
    # float64 on the CPU: some devices have none
    row_T, by_token = batch.row_T.cpu(), {name: value.cpu().double() for name, value in values.items()}
    summed = [name for name in by_token if name not in ("entropy", "target")]
    found = {name: sum_by_row(by_token[name], row_T, batch.num_rows) for name in summed}
    num_tokens_B = batch.num_tokens_B.cpu()
    first_B = num_tokens_B.cumsum(0) - num_tokens_B
    found |= {f"{name}_first": by_token[name][first_B] for name in ("kld", "rkld") if name in by_token}
    return found | {"tokens": num_tokens_B.double()}
