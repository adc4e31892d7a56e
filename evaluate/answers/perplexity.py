"""What a model itself makes of gold responses, and of a teacher's cache: measured once, kept beside its answers.

The model is not run here: `OpenModel` is handed in, as this room knows neither a loss nor a cache. What comes back is
kept in files whose names hold the fingerprint of all that it depends on, so that nothing stale is ever read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dpkd.core.files import write_text
from dpkd.core.identity import fingerprint
from dpkd.core.progress import Progress, say
from dpkd.evaluate.inputs.eval_sets import EvalSet
from dpkd.evaluate.inputs.models import Candidate
from dpkd.evaluate.options.eval import EvalConfig

# part of every fingerprint: raised when the same inputs would be measured otherwise
_FORMAT_VERSION = 1
_SHORT = 16  # digits of a fingerprint in a file's name
_BATCH_ROWS = 16
_BATCH_TOKENS = 8192  # padding counted
_FILLED = 0.75  # of a batch's longest row: a shorter one begins the next batch

#: ids of a prompt, ids of the response to it
Pair = tuple[Sequence[int], Sequence[int]]


class OpenedModel(Protocol):
    """One model under evaluation; its weights are loaded when they are first needed, and once."""

    def nll(self, pairs: Sequence[Pair]) -> list[float]:
        """-log q of each response after its prompt, summed over the response's tokens (nats)."""
        ...

    def to_teacher(self, location: str, num_rows: int) -> dict[str, list[float]] | None:
        """Values of each of at most `num_rows` rows of the cache at `location`, by name; None where it has none.

        `tokens`; sums over them: `nll`, `kld`, `rkld`, `agrees`; `kld_first` and `rkld_first`, at the first token.
        """
        ...


OpenModel = Callable[[Candidate, EvalConfig], OpenedModel]


@dataclass(frozen=True)
class References:
    """Gold responses of one set (N examples) under one model.

    `nll_N` is -log q of each with its EOS (nats; NaN where prompt and response are longer than the positions of one of
    the models), `num_tokens_N` counts the model's own tokens, EOS included, `num_bytes_N` the text's bytes in UTF-8.
    """

    nll_N: np.ndarray
    num_tokens_N: np.ndarray
    num_bytes_N: np.ndarray


@dataclass(frozen=True)
class ModelMeasures:
    """Of one model: `references` by set, `to_teacher` as `OpenedModel.to_teacher` has it."""

    references: dict[str, References]
    to_teacher: dict[str, list[float]] | None = None


def measure_models(
    config: EvalConfig,
    candidates: Sequence[Candidate],
    eval_sets: Sequence[EvalSet],
    open_model: OpenModel,
    cache: str | None,
) -> dict[str, ModelMeasures]:
    """The measures that `config` asks for, by model; `cache` is the fingerprint of `config.cache`."""
    found = {}
    for candidate in candidates:
        model = open_model(candidate, config)
        references = _measure_references(config, candidate, eval_sets, model) if config.perplexity else {}
        to_teacher = None
        if cache is not None and config.cache_rows > 0:
            to_teacher = _measure_to_teacher(config, candidate, model, cache)
        found[candidate.name] = ModelMeasures(references, to_teacher)
    _leave_out_for_all(found, eval_sets)
    return found


def _leave_out_for_all(found: dict[str, ModelMeasures], eval_sets: Sequence[EvalSet]) -> None:
    """A response that one model's positions cannot hold counts for none, so that like is compared with like."""
    for eval_set in eval_sets:
        of_set = [measures.references[eval_set.name] for measures in found.values() if measures.references]
        if not of_set:
            continue
        unknown_N = np.isnan([references.nll_N for references in of_set]).any(axis=0)
        for references in of_set:
            references.nll_N[unknown_N] = np.nan
        if unknown_N.any():
            say(
                f"data {eval_set.name}: {int(unknown_N.sum())} gold responses are longer than the positions of a model "
                "and are left out of perplexity"
            )


def _measure_references(
    config: EvalConfig, candidate: Candidate, eval_sets: Sequence[EvalSet], model: OpenedModel
) -> dict[str, References]:
    pairs = {eval_set.name: _pairs(candidate, eval_set) for eval_set in eval_sets}
    files = {
        name: _KeptValues(
            config.generations_dir() / candidate.name / name,
            fingerprint({"format_version": _FORMAT_VERSION, **candidate.identity, "pairs": of_set}),
        )
        for name, of_set in pairs.items()
    }
    batches = [
        (name, batch)
        for name, of_set in pairs.items()
        for batch in _batches([len(prompt) + len(response) for prompt, response in of_set], _limit(candidate))
    ]
    # a batch is measured whole or not at all: a resumed evaluation then rounds as one that was never killed
    missing = [(name, batch) for name, batch in batches if any(row not in files[name].values for row in batch)]
    if missing:
        num_total = sum(len(batch) for _, batch in batches)
        num_missing = sum(len(batch) for _, batch in missing)
        label = f"model {candidate.name}, perplexity"
        with Progress(label, num_total, "gold responses", done=num_total - num_missing) as progress:
            for name, batch in missing:
                files[name].add(dict(zip(batch, model.nll([pairs[name][row] for row in batch]), strict=True)))
                progress.advance(len(batch))
    return {
        eval_set.name: References(
            np.array([files[eval_set.name].values.get(row, math.nan) for row in range(len(eval_set.examples))]),
            np.array([len(response) for _, response in pairs[eval_set.name]]),
            np.array([len(example.references[0].encode()) for example in eval_set.examples]),
        )
        for eval_set in eval_sets
    }


def _pairs(candidate: Candidate, eval_set: EvalSet) -> list[Pair]:
    """Each prompt as the model is asked, and the gold response (the first reference) as it would be trained on."""
    return [
        (prompt.ids, candidate.encoder.response_ids(prompt, example.references[0]))
        for prompt, example in zip(eval_set.prompts[candidate.name], eval_set.examples, strict=True)
    ]


def _limit(candidate: Candidate) -> float:
    return candidate.source.max_positions or math.inf


def _batches(lengths: Sequence[int], limit: float) -> Iterator[list[int]]:
    """Rows of about the same length together (padding costs as text does), longest first; none is over `limit`."""
    batch: list[int] = []
    for row in sorted((row for row, length in enumerate(lengths) if length <= limit), key=lambda row: -lengths[row]):
        # the first of a batch is its longest
        longest = lengths[batch[0] if batch else row]
        is_full = len(batch) == _BATCH_ROWS or (len(batch) + 1) * longest > _BATCH_TOKENS
        if batch and (is_full or lengths[row] < _FILLED * longest):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _measure_to_teacher(
    config: EvalConfig, candidate: Candidate, model: OpenedModel, cache: str
) -> dict[str, list[float]] | None:
    assert config.cache is not None  # whose fingerprint `cache` is
    made_by = {"format_version": _FORMAT_VERSION, **candidate.identity, "cache": cache, "rows": config.cache_rows}
    # a set's folder cannot have this name: names start with a letter or digit
    path = config.generations_dir() / candidate.name / f"_teacher-{fingerprint(made_by)[:_SHORT]}.json"
    if path.exists():
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["fingerprint"] == fingerprint(made_by):
                return dict(kept["values"])
        except (ValueError, KeyError, TypeError) as error:
            say(f"{path} cannot be read ({type(error).__name__}); it is measured again")
    values = model.to_teacher(config.cache, config.cache_rows)
    if values is not None:
        write_text(path, json.dumps({"fingerprint": fingerprint(made_by), "values": values}) + "\n")
    return values


class _KeptValues:
    """Values by row in a file of lines that grows batch by batch; a line cut short and all after it are dropped."""

    def __init__(self, folder: Path, made_by: str) -> None:
        self._path = folder / f"references-{made_by[:_SHORT]}.jsonl"
        self._head = {"fingerprint": made_by}
        self.values: dict[int, float] = {}
        self._num_bytes = 0  # up to the end of the last whole line
        for number, line in enumerate(self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else ()):
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
                if value is None or (number == 0 and value != self._head):
                    break
                if number > 0:
                    self.values |= {int(row): float(nll) for row, nll in value}
            except (ValueError, TypeError):
                break
            self._num_bytes += len(line)

    def add(self, values: dict[int, float]) -> None:
        lines: list[object] = [] if self._num_bytes else [self._head]
        text = "".join(json.dumps(line) + "\n" for line in (*lines, list(values.items()))).encode()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("r+b" if self._path.exists() else "wb") as file:
            file.truncate(self._num_bytes)
            file.seek(self._num_bytes)
            file.write(text)
        self._num_bytes += len(text)
        self.values |= values
