"""The way between rows and the Arrow table of a shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpkd.teacher_cache.engines.engine import Distributions, EngineResult
from dpkd.teacher_cache.store.codec import decode_logprobs, encode_logprobs
from dpkd.teacher_cache.store.rows import CachedRow, PlannedRow
from dpkd.teacher_cache.store.schema import ROUND_SCHEMA, ROW_SCHEMA, with_extra


def to_table(rows: Sequence[tuple[PlannedRow, EngineResult, str]]) -> pa.Table:
    """The table of a shard from its planned rows, their results and the response texts."""
    schema = ROUND_SCHEMA if any(plan.sampling_logprobs is not None for plan, _, _ in rows) else ROW_SCHEMA
    extra = {
        "span_starts": any(plan.spans is not None for plan, _, _ in rows),
        "teacher_prompt_ids": any(plan.teacher_prompt_ids is not None for plan, _, _ in rows),
    }
    schema = with_extra(schema, [name for name, wanted in extra.items() if wanted])
    columns: dict[str, list[object]] = {field.name: [] for field in schema}
    nothing = np.zeros(0, np.int32)
    for plan, result, text in rows:
        given = plan.response_ids is not None
        in_span = plan.in_spans(len(result.response_ids))
        between_ids = result.response_ids[~in_span]
        if len(between_ids):
            result = select_positions(result, in_span)
        top = result.distributions
        spans = plan.spans or [(len(plan.prompt_ids), len(result.response_ids))]
        values: dict[str, object] = {
            "example_id": plan.example_id,
            "sample": plan.sample,
            "origin": plan.origin,
            "finish_reason": plan.finish_reason if given else result.finish_reason,
            "prompt": plan.prompt,
            "response": text,
            "prompt_ids": np.asarray(plan.prompt_ids, np.int32),
            "response_ids": result.response_ids,
            "response_logprobs": result.logprobs_T,
            "entry_counts": nothing if top is None else top.counts_T,
            "entry_ids": nothing if top is None else top.ids_E,
            "entry_logprob_steps": nothing if top is None else encode_logprobs(top.logprobs_E, top.counts_T),
            "log_remainder": nothing if top is None else top.log_tail_T,
            "sampling_logprobs": plan.sampling_logprobs,
            "cached_sampling_logprob": plan.cached_sampling_logprob,
            "span_starts": [start for start, _ in spans],
            "span_lengths": [length for _, length in spans],
            "between_ids": between_ids,
            "teacher_prompt_ids": np.asarray(plan.asked_ids, np.int32),
        }
        for name, column in columns.items():
            column.append(values[name])
    return pa.table({field.name: _column(columns[field.name], field.type) for field in schema}, schema=schema)


def mean_logprobs(table: pa.Table, *, ends_known: bool) -> np.ndarray:
    """Mean log-prob of a token of every response, its EOS included, in nats; 0 for a response without tokens.

    Reads `response_logprobs`, and `finish_reason` unless `ends_known`. Without it, an EOS stored with a log-prob of 0
    is left out: how likely it was is unknown.
    """
    lists = table["response_logprobs"]
    lengths = pc.list_value_length(lists).to_numpy()
    values = pc.list_flatten(lists).to_numpy()
    # each response is summed by itself, so that equal ones have equal means
    sums = np.bincount(np.repeat(np.arange(len(lengths)), lengths), weights=values, minlength=len(lengths))
    if not ends_known:
        ended = np.flatnonzero((np.array(table["finish_reason"].to_pylist()) == "stop") & (lengths > 0))
        is_unknown = values[np.cumsum(lengths)[ended] - 1] == 0
        lengths = lengths - np.bincount(ended[is_unknown], minlength=len(lengths))
    return sums / np.maximum(lengths, 1)


def select_positions(result: EngineResult, mask_T: np.ndarray) -> EngineResult:
    """`result` at some of its response positions."""
    top = result.distributions
    return replace(
        result,
        response_ids=result.response_ids[mask_T],
        # a cache of texts alone has none
        logprobs_T=result.logprobs_T[mask_T] if len(result.logprobs_T) else result.logprobs_T,
        distributions=None if top is None else top.positions(mask_T),
    )


def _column(values: list[object], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    arrays = [np.asarray(value) for value in values]
    offsets = np.cumsum([0, *map(len, arrays)]).astype(np.int32)
    flat = np.concatenate(arrays) if arrays else np.zeros(0)
    items = pa.array(flat.astype(kind.value_type.to_pandas_dtype()), kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), items, type=kind)


class ShardRows:
    """The rows of one shard. Arrays of a row are views of the table, except the log-probs, which are decoded."""

    def __init__(self, table: pa.Table) -> None:
        self._text = {name: table[name].to_pylist() for name in ("example_id", "sample", "origin", "finish_reason")}
        self._table = table
        self._lists = {field.name: _flat(table[field.name]) for field in table.schema if pa.types.is_list(field.type)}
        self._of_round = "sampling_logprobs" in self._lists
        self._has_spans, self._has_teacher_prompts = "span_starts" in self._lists, "teacher_prompt_ids" in self._lists

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def texts(self, index: int) -> tuple[str, str]:
        """Prompt and response as text."""
        return self._table["prompt"][index].as_py(), self._table["response"][index].as_py()

    def key(self, index: int) -> tuple[str, int]:
        """Example id and sample number of a row, which identify it within its origin."""
        return self._text["example_id"][index], self._text["sample"][index]

    @cached_property
    def index_of(self) -> dict[tuple[str, int], int]:
        """Index of every row by its key."""
        return {self.key(index): index for index in range(len(self))}

    def row(self, index: int) -> CachedRow:
        """Row `index` of the shard."""
        counts = self._slice("entry_counts", index)
        distributions = None
        if len(counts):
            distributions = Distributions(
                counts,
                self._slice("entry_ids", index),
                decode_logprobs(self._slice("entry_logprob_steps", index), counts),
                self._slice("log_remainder", index),
            )
        spans = between = asked = None
        if self._has_spans and len(starts := self._slice("span_starts", index)) > 1:
            spans, between = (
                np.stack([starts, self._slice("span_lengths", index)], 1),
                self._slice("between_ids", index),
            )
        if self._has_teacher_prompts:
            asked = self._slice("teacher_prompt_ids", index)
        return CachedRow(
            example_id=self._text["example_id"][index],
            sample=self._text["sample"][index],
            origin=self._text["origin"][index],
            finish_reason=self._text["finish_reason"][index],
            prompt_ids=self._slice("prompt_ids", index),
            response_ids=self._slice("response_ids", index),
            response_logprobs=self._slice("response_logprobs", index),
            distributions=distributions,
            sampling_logprobs=self._slice("sampling_logprobs", index) if self._of_round else None,
            cached_sampling_logprob=self._table["cached_sampling_logprob"][index].as_py() if self._of_round else None,
            spans=spans,
            between_ids=between,
            teacher_prompt_ids=asked,
        )

    def _slice(self, name: str, index: int) -> np.ndarray:
        values, offsets = self._lists[name]
        return values[offsets[index] : offsets[index + 1]]


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    if column.num_chunks == 1:
        array = column.chunk(0)  # `combine_chunks` would copy it, and the table keeps the original: twice the memory
    else:
        array = column.combine_chunks() if column.num_chunks else pa.array([], column.type)
    offsets = array.offsets.to_numpy()
    return array.values.to_numpy(zero_copy_only=False)[offsets[0] :], offsets - offsets[0]
