"""What the study of objectives (`objectives_study.py`) measures: distances, answers, and sizes of caches."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from study_arms import Study

from dpkd.core.devices import choose_device
from dpkd.core.identity import derive_seed
from dpkd.core.models import ModelSource, locate_model
from dpkd.core.prompts.examples import Example
from dpkd.core.prompts.limits import encode_examples
from dpkd.core.prompts.sources import open_examples
from dpkd.core.prompts.templates import EncodedPrompt, PromptEncoder
from dpkd.distill.batches.batch import Batch, cut_entries
from dpkd.distill.batches.collate import collate
from dpkd.distill.objectives.statistics import Positions
from dpkd.distill.objectives.student_forward import StudentScorer
from dpkd.distill.rows.row import TrainingRow
from dpkd.evaluate.metrics.scores import score
from dpkd.teacher_cache.engines.engine import (
    Distributions,
    EngineOptions,
    EngineResult,
    GenerateRequest,
    Sampling,
    results_only,
)
from dpkd.teacher_cache.engines.open import open_engine, resolve_engine
from dpkd.teacher_cache.store.reader import TeacherCache
from dpkd.teacher_cache.store.rows import PlannedRow, unscored_row
from dpkd.teacher_cache.store.shards import encode_shard
from dpkd.teacher_cache.store.tables import to_table

_MEASURED = 8  # rows of a forward pass with full logits
_ENCODED_ROWS = 128


def measure(study: Study, path: str, *, scored: bool) -> dict[str, Any]:
    """Distances of the model `path` from the teacher, and with `scored` its answers' scores by data set."""
    source = locate_model(path, "model")
    held_out = TeacherCache.open(study.out / "selection")
    shards = [shard for _, shard in held_out.scan(held_out.shards())]
    rows = [
        (row.prompt_ids.tolist(), row.response_ids.tolist())
        for shard in shards
        for row in map(shard.row, range(len(shard)))
    ]
    found: dict[str, Any] = distances(study, source, rows)
    if scored:
        drawn = answers(study, source)
        found |= {f"own_{name}": value for name, value in distances(study, source, drawn.pop("own")).items()} | drawn
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


@cache
def _teacher_scorer(teacher: str, device: torch.device) -> StudentScorer:
    return _scorer(locate_model(teacher, "teacher"), device)


def _scorer(source: ModelSource, device: torch.device) -> StudentScorer:
    model = source.load("float32").to(device).eval()
    return StudentScorer(model, num_tokens=len(source.tokenizer), logits_chunk=1 << 20)


def _log_softmax(at: Positions) -> dict[str, torch.Tensor]:
    return {"logs": at.logits_CV - at.log_sum_C[:, None]}


@torch.no_grad()
def distances(
    study: Study, source: ModelSource, rows: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> dict[str, float]:
    """Means over the tokens of `rows` (prompt and response ids), over the whole vocabulary, in nats.

    `kl` is KL(p || q), `rkl` KL(q || p), p the teacher; `teacher_logprob` and `logprob` are of the response's tokens.
    """
    device = choose_device(study.device)
    student, teacher = _scorer(source, device), _teacher_scorer(study.teacher, device)
    sums: dict[str, float] = {}
    count = 0
    for start in range(0, len(rows), _MEASURED):
        chosen = [TrainingRow(unscored_row(*row)) for row in rows[start : start + _MEASURED]]
        batch: Batch = collate(chosen, with_distributions=False).to(device)
        read: Any = (batch.input_ids_BS, batch.row_T, batch.predict_T, {}, (_log_softmax,))
        log_p_TV, log_q_TV = teacher(*read)["logs"], student(*read)["logs"]
        width = min(log_p_TV.shape[1], log_q_TV.shape[1])
        gap_TV = log_p_TV[:, :width] - log_q_TV[:, :width]
        target_T1 = batch.target_T[:, None]
        values = {
            "kl": (log_p_TV[:, :width].exp() * gap_TV).sum(1),
            "rkl": -(log_q_TV[:, :width].exp() * gap_TV).sum(1),
            "entropy": -(log_q_TV.exp() * log_q_TV).sum(1),
            "top1_agreement": (log_p_TV.argmax(1) == log_q_TV.argmax(1)).float(),
            "teacher_logprob": log_p_TV.gather(1, target_T1)[:, 0],
            "logprob": log_q_TV.gather(1, target_T1)[:, 0],
        }
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + float(value.double().sum())
        count += batch.num_positions
    return {name: value / count for name, value in sums.items()}


@cache
def _eval_rows(path: str, limit: int, teacher: str) -> list[tuple[Example, EncodedPrompt]]:
    """Rows with references and with prompts of at most 256 tokens, the paper's limit."""
    encoder = PromptEncoder(locate_model(teacher, "teacher").tokenizer, "chat")
    found = [item for item in encode_examples(open_examples(path), encoder, 256) if isinstance(item, tuple)]
    return [item for item in found if item[0].references][:limit]


def answers(study: Study, source: ModelSource) -> dict[str, Any]:
    """Scores of sampled answers by data set (means over generation seeds, a row each), and the selection's ids."""
    sets = {"selection": (study.select, study.select_rows)} | {
        name: (path, study.eval_rows) for name, path in study.evals.items()
    }
    keys = [
        (name, seed, example, prompt)
        for name, (path, limit) in sets.items()
        for example, prompt in _eval_rows(path, limit, study.teacher)
        for seed in study.eval_seeds
    ]
    longest = max(len(prompt.ids) for *_, prompt in keys) + study.tokens
    options = EngineOptions(longest, 0, "float32", device=study.device, max_num_seqs=study.max_num_seqs)
    requests = [
        GenerateRequest(index, prompt.ids, derive_seed(seed, example.example_id, bits=31))
        for index, (_, seed, example, prompt) in enumerate(keys)
    ]
    requests.sort(key=lambda request: len(request.prompt_ids))  # less padding
    sampling = Sampling(1.0, 1.0, study.tokens, tuple(source.stop_token_ids()))
    with open_engine(resolve_engine(study.engine), source, options) as engine:  # type: ignore[arg-type]
        results = {result.index: result for result in results_only(engine.generate(requests, sampling))}
    found: dict[str, Any] = {"own": []}
    by_set: dict[str, dict[str, list[dict[str, float]]]] = {}
    for index, (name, _, example, prompt) in enumerate(keys):
        ids = results[index].response_ids.tolist()
        scores = score(source.decode(ids), example.references)
        ended = {"tokens": float(len(ids)), "unfinished": 100.0 * (results[index].finish_reason == "length")}
        row = scores._asdict() | ended
        by_set.setdefault(name, {}).setdefault(example.example_id, []).append(row)
        if name == "selection":
            found["own"].append((prompt.ids, ids))
    for name, rows in by_set.items():
        every = [row for several in rows.values() for row in several]
        for key in ("rouge_l", "num_words", "tokens", "self_repetition", "unfinished"):
            found[f"{name}_{key}"] = float(np.mean([row[key] for row in every]))
        found[f"{name}_rouge_rows"] = [round(float(np.mean([row["rouge_l"] for row in s])), 3) for s in rows.values()]
    return found


def cache_size(study: Study, top_k: int | None, top_mass: float | None) -> dict[str, float]:
    """Entries and bytes a position of the cache if it kept so many entries, from its first rows."""
    cached = TeacherCache.open(study.out / "cache")
    _, shard = next(iter(cached.scan(cached.shards())))
    rows = [shard.row(index) for index in range(min(len(shard), _ENCODED_ROWS))]
    table = []
    for index, row in enumerate(rows):
        batch = cut_entries(collate([TrainingRow(row)], with_distributions=True), top_k, top_mass)
        assert batch.entry_ids_TK is not None
        assert batch.entry_logprobs_TK is not None
        assert batch.entry_counts_T is not None
        assert batch.log_tail_T is not None
        kept_TK = batch.entry_ids_TK >= 0
        top = Distributions(
            batch.entry_counts_T.numpy().astype(np.int32),
            batch.entry_ids_TK[kept_TK].numpy().astype(np.int32),
            batch.entry_logprobs_TK[kept_TK].numpy(),
            batch.log_tail_T.numpy(),
        )
        planned = PlannedRow(index, row.example_id, row.sample, "teacher", "", row.prompt_ids.tolist())
        table.append((planned, EngineResult(index, row.response_ids, "stop", row.response_logprobs, top), ""))
    data, record = encode_shard(to_table(table), "", "teacher")
    return {"entries": record.entries / record.positions, "bytes": len(data) / record.positions}
