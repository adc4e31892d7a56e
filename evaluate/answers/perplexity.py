"""Metrics of a model itself: perplexity of gold responses, and distance from the teacher of a cache.

They are measured once and kept on disk. Each file's name has the fingerprint of everything that its values depend on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dpkd.core.bridges import load_bridge
from dpkd.core.errors import UserError
from dpkd.core.files import write_text
from dpkd.core.identity import fingerprint
from dpkd.core.json_lines import AppendOnlyLines, loads
from dpkd.core.progress import Progress, say
from dpkd.evaluate.answers.generation import LazyEngine
from dpkd.evaluate.inputs.eval_sets import EvalSet
from dpkd.evaluate.inputs.models import Candidate
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.teacher_cache.engines.engine import Engine, EngineOptions, ScoreRequest, results_only

# part of every fingerprint: increment it when the same inputs would give other values
_FORMAT_VERSION = 2
_SHORT = 16  # digits of the fingerprint in a file's name
_BATCH_ROWS = 16  # measured and saved together

#: token ids of a prompt and of its response
Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class References:
    """Gold responses of one set (N examples) under one model.

    `nll_N` is -log q of each with its EOS, in nats (NaN if prompt and response are longer than the positions of one of
    the models). `num_tokens_N` counts the model's own tokens with EOS, `num_bytes_N` the text's bytes in UTF-8.
    """

    nll_N: np.ndarray
    num_tokens_N: np.ndarray
    num_bytes_N: np.ndarray


@dataclass(frozen=True)
class ModelMetrics:
    """`references` by set; `to_teacher`: values of each cached row by name, or None."""

    references: dict[str, References] = field(default_factory=dict)
    to_teacher: dict[str, list[float]] | None = None


def reference_pairs(config: EvalConfig, candidate: Candidate, eval_sets: Sequence[EvalSet]) -> dict[str, list[Pair]]:
    """By set, each prompt and its gold response (the first reference), encoded as in training; empty if not needed."""
    if not config.perplexity:
        return {}
    return {
        eval_set.name: [
            (prompt.ids, candidate.encoder.response_ids(prompt, example.references[0]))
            for prompt, example in zip(eval_set.prompts[candidate.name], eval_set.examples, strict=True)
        ]
        for eval_set in eval_sets
    }


def engine_options(
    config: EvalConfig, engine: str, candidate: Candidate, pairs: Mapping[str, Sequence[Pair]]
) -> EngineOptions:
    """Engine options for the longest answer to generate and the longest gold response that fits the model."""
    options = config.engine_options()
    lengths = (_length(pair) for of_set in pairs.values() for pair in of_set)
    longest = max((length for length in lengths if length <= _limit(candidate, engine)), default=0)
    return replace(options, max_length=max(options.max_length, longest))


def measure_references(
    config: EvalConfig,
    candidate: Candidate,
    eval_sets: Sequence[EvalSet],
    pairs: Mapping[str, Sequence[Pair]],
    engine: LazyEngine,
) -> dict[str, References]:
    """-log q of the gold responses in `pairs`, by set; the engine starts only for missing ones.

    Raises `UserError` if the model's log-probs are not finite.
    """
    logs, values = {}, {}
    for name, of_set in pairs.items():
        made_by = fingerprint(
            {"format_version": _FORMAT_VERSION, "engine": engine.name, **candidate.identity, "pairs": of_set}
        )
        path = config.generations_dir() / candidate.name / name / f"references-{made_by[:_SHORT]}.jsonl"
        logs[name] = AppendOnlyLines(path, {"fingerprint": made_by})
        rows = logs[name].read(lambda line: [(int(row), float(nll)) for row, nll in line])
        values[name] = dict(pair for pairs_of_line in rows for pair in pairs_of_line)
    batches = [(name, batch) for name, of_set in pairs.items() for batch in _batches(of_set, candidate, engine.name)]
    # whole batches: a resumed evaluation then rounds like one that was never interrupted
    missing = [(name, batch) for name, batch in batches if any(row not in values[name] for row in batch)]
    if missing:
        num_total = sum(len(batch) for _, batch in batches)
        num_missing = sum(len(batch) for _, batch in missing)
        running = engine.start(f"the perplexity of {num_missing} gold responses")
        label = f"model {candidate.name}, perplexity"
        with Progress(label, num_total, "gold responses", done=num_total - num_missing) as progress:
            for name, batch in missing:
                measured = dict(zip(batch, _nll(running, [pairs[name][row] for row in batch], candidate), strict=True))
                logs[name].append(list(measured.items()))
                values[name] |= measured
                progress.advance(len(batch))
    return {
        eval_set.name: References(
            np.array([values[eval_set.name].get(row, math.nan) for row in range(len(eval_set.examples))]),
            np.array([len(response) for _, response in pairs[eval_set.name]]),
            np.array([len(example.references[0].encode()) for example in eval_set.examples]),
        )
        for eval_set in eval_sets
        if eval_set.name in pairs
    }


def leave_out_for_all(by_model: Sequence[Mapping[str, References]]) -> None:
    """Drop, for all models, responses too long for one of them: all perplexities are then over the same rows."""
    for name in dict.fromkeys(name for references in by_model for name in references):
        of_set = [references[name] for references in by_model if name in references]
        unknown_N = np.isnan([references.nll_N for references in of_set]).any(axis=0)
        for references in of_set:
            references.nll_N[unknown_N] = np.nan
        if unknown_N.any():
            say(
                f"data {name}: {int(unknown_N.sum())} gold responses are longer than the positions of a model and are "
                "left out of perplexity"
            )


def measure_to_teacher(config: EvalConfig, candidate: Candidate, cache: str) -> dict[str, list[float]] | None:
    """Values for each of at most `config.cache_rows` rows of `config.cache`, whose fingerprint is `cache`.

    `tokens`; sums over tokens: `nll`, `kld`, `rkld` (nats), `top1_agreement`; at the first token: `kld_first`,
    `rkld_first`. None if they are not defined, for example with another tokenizer.
    """
    made_by = {"format_version": _FORMAT_VERSION, **candidate.identity, "cache": cache, "rows": config.cache_rows}
    # no set has a folder of this name: names start with a letter or digit
    path = config.generations_dir() / candidate.name / f"_teacher-{fingerprint(made_by)[:_SHORT]}.json"
    if path.exists():
        try:
            kept = loads(path.read_text(encoding="utf-8"))
            if kept["fingerprint"] == fingerprint(made_by):
                return dict(kept["values"])
        except (ValueError, KeyError, TypeError) as error:
            say(f"{path} cannot be read ({type(error).__name__}); it is measured again")
    values: dict[str, list[float]] | None = load_bridge("divergence_from_teacher")(candidate, config)
    if values is not None:
        write_text(path, json.dumps({"fingerprint": fingerprint(made_by), "values": values}) + "\n")
    return values


def _length(pair: Pair) -> int:
    return len(pair[0]) + len(pair[1])


def _limit(candidate: Candidate, engine: str) -> float:
    """Longest prompt and response that the engine scores: vLLM adds one token."""
    return (candidate.source.max_positions or math.inf) - (engine == "vllm")


def _batches(pairs: Sequence[Pair], candidate: Candidate, engine: str) -> Iterator[list[int]]:
    """Rows of similar length (padding costs as much as text), longest first, without those that are too long."""
    rows = [row for row, pair in enumerate(pairs) if _length(pair) <= _limit(candidate, engine)]
    rows.sort(key=lambda row: -_length(pairs[row]))
    for start in range(0, len(rows), _BATCH_ROWS):
        yield rows[start : start + _BATCH_ROWS]


def _nll(engine: Engine, pairs: Sequence[Pair], candidate: Candidate) -> list[float]:
    """-log q of each response after its prompt, summed over the response's tokens (nats)."""
    values = [math.nan] * len(pairs)
    for result in results_only(engine.score(ScoreRequest(index, *pair) for index, pair in enumerate(pairs))):
        values[result.index] = -float(result.logprobs_T.astype(np.float64).sum())
    if not np.isfinite(values).all():
        raise UserError(
            "the model's log-probs are not finite",
            where=candidate.source.name,
            advice="Check the checkpoint and --set dtype, or skip perplexity with --no-perplexity",
        )
    return values
