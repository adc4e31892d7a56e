"""Rows that a student is made with: some to choose its weights on, others to measure it on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpkd.core.errors import UserError
from dpkd.core.identity import derive_seed
from dpkd.core.models import ModelSource
from dpkd.core.prompts.examples import SkippedRow
from dpkd.core.prompts.limits import encode_examples
from dpkd.core.prompts.sources import open_examples
from dpkd.core.prompts.templates import PromptEncoder, TemplateName
from dpkd.distill.batches.batch import Batch
from dpkd.distill.objectives.statistics import Positions, log_rest, target_logprob
from dpkd.distill.objectives.student_forward import StudentScorer
from dpkd.distill.rows.row import TrainingRow
from dpkd.distill.student.measures import sample_rows
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.rows import unscored_row

#: of --data: longest prompt (others are skipped) and longest response (others are cut), in tokens
MAX_PROMPT_TOKENS = MAX_RESPONSE_TOKENS = 256
_TOP_K = 64


@dataclass(frozen=True)
class Calibration:
    """Rows to `choose` weights on and `held` rows to measure the student on; no example is in both.

    `identity` records where they come from and how many they are at most; `where` says it in words.
    """

    choose: list[TrainingRow]
    held: list[TrainingRow]
    identity: dict[str, Any]
    where: str

    @property
    def is_cached(self) -> bool:
        """Whether the rows are a cache's, with what it has of the teacher."""
        return "cache" in self.identity


def rows_of_cache(cache: TeacherCache, num_rows: int) -> Calibration:
    """At most `num_rows` rows of `cache`: the same ones at every call."""
    identity = {"cache": cache.fingerprint, "cache_rows": num_rows}
    return _split(sample_rows(cache, num_rows), identity, str(cache.folder))


def rows_of_data(
    data: str,
    template: TemplateName,
    teacher: ModelSource,
    num_rows: int,
    template_args: Mapping[str, str] | None = None,
) -> Calibration:
    """At most `num_rows` rows of `data` with their first reference as the response, prompts as `PromptEncoder` does.

    Of a row without references all tokens of the prompt but the first are measured. Raises `UserError` when no two
    rows can be used.
    """
    encoder = PromptEncoder(teacher.tokenizer, template, template_args)
    source = open_examples(data)
    rows = []
    for item in encode_examples(source, encoder, MAX_PROMPT_TOKENS):
        if isinstance(item, SkippedRow):
            continue
        example, prompt = item
        if example.references:
            response_ids = encoder.response_ids(prompt, example.references[0])[:MAX_RESPONSE_TOKENS]
            rows.append(unscored_row(prompt.ids, response_ids, example.example_id))
        elif len(prompt.ids) > 1:
            rows.append(unscored_row(prompt.ids[:1], prompt.ids[1:], example.example_id))
    rows.sort(key=lambda row: derive_seed(0, row.example_id, row.sample, bits=63))
    identity = {"data": source.identity, "template": encoder.identity(), "data_rows": num_rows}
    return _split([TrainingRow(row) for row in rows[:num_rows]], identity, data)


def _split(rows: list[TrainingRow], identity: dict[str, Any], where: str) -> Calibration:
    """A quarter of `rows` to choose on; the others, except further responses to the same prompts, to measure on."""
    choose = rows[: max(len(rows) // 4, 1)]
    chosen = {row.chosen.example_id for row in choose}
    held = [row for row in rows if row.chosen.example_id not in chosen]
    if not held:
        raise UserError(
            "there are too few rows to choose a student's weights on some and measure it on others",
            found=f"rows of {len({row.chosen.example_id for row in rows})} examples",
            expected="rows of at least 2",
            where=where,
            advice="Give more rows with --cache or --data, or raise --cache-rows",
        )
    # rows of like length follow each other: little padding
    return Calibration(sorted(choose, key=_length), sorted(held, key=_length), identity, where)


def _length(row: TrainingRow) -> int:
    return row.chosen.num_tokens


@torch.no_grad()
def with_teacher(teacher: PreTrainedModel, batches: Iterable[Batch], num_tokens: int) -> list[Batch]:
    """`batches` with the teacher's distributions: its 64 most likely tokens and the tail, and log p of responses."""
    scorer = StudentScorer(teacher.eval(), num_tokens=num_tokens)
    scored = []
    for batch in batches:
        values = scorer(**batch.sequences, fields={"target_id": batch.target_T}, statistics=(_top_k,))
        ids_TK = values["ids"]
        scored.append(
            replace(
                batch,
                entry_ids_TK=ids_TK,
                entry_logprobs_TK=values["logprobs"],
                entry_counts_T=torch.full_like(batch.target_T, ids_TK.shape[1]),
                log_tail_T=values["log_tail"],
                teacher_logprob_T=values["target"],
            )
        )
    return scored


def _top_k(at: Positions) -> dict[str, Tensor]:
    num_logits = at.logits_CV.shape[1]
    top_CK, ids_CK = at.logits_CV.topk(min(_TOP_K, num_logits), dim=1)
    logprobs_CK = top_CK - at.log_sum_C[:, None]
    log_tail_C = log_rest(logprobs_CK)
    if num_logits <= _TOP_K:  # every token is kept
        log_tail_C = torch.full_like(log_tail_C, -torch.inf)
    return target_logprob(at) | {"ids": ids_CK, "logprobs": logprobs_CK, "log_tail": log_tail_C}
