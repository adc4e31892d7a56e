"""The row of the cache as an Arrow schema, and the way between engine results and Arrow tables.

A row is one response to one prompt as the teacher sees it; docs/cache-format.md describes every column.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import pyarrow as pa

from dpkd.teacher_cache.engines.engine import Distributions, EngineResult
from dpkd.teacher_cache.store.codec import decode_logprobs, encode_logprobs

if TYPE_CHECKING:
    from dpkd.core.prompts.templates import EncodedPrompt

#: the newest format that this version reads
FORMAT_VERSION = 2
Origin = Literal["teacher", "reference", "student"]


def _list(value_type: pa.DataType) -> pa.DataType:
    # list items are named as Parquet returns them
    return pa.list_(pa.field("element", value_type, nullable=False))


ROW_SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        pa.field("prompt_ids", _list(pa.int32()), nullable=False),
        pa.field("response_ids", _list(pa.int32()), nullable=False),
        pa.field("response_logprobs", _list(pa.float32()), nullable=False),
        pa.field("entry_counts", _list(pa.int32()), nullable=False),
        pa.field("entry_ids", _list(pa.int32()), nullable=False),
        pa.field("entry_logprob_steps", _list(pa.uint16()), nullable=False),
        pa.field("log_remainder", _list(pa.float32()), nullable=False),
    ]
)
#: the columns of a round's shards since format 2: how likely the student, or what else drew the response, found it
ROUND_SCHEMA = ROW_SCHEMA.append(pa.field("sampling_logprobs", _list(pa.float32()), nullable=False)).append(
    pa.field("cached_sampling_logprob", pa.float64())
)
#: columns of caches of format 2 whose rows have several spans, or other prompts for the teacher than for the student
EXTRA_COLUMNS: Final = {
    "spans": (
        pa.field("span_starts", _list(pa.int32()), nullable=False),
        pa.field("span_lengths", _list(pa.int32()), nullable=False),
        pa.field("between_ids", _list(pa.int32()), nullable=False),
    ),
    "teacher_prompt": (pa.field("teacher_prompt_ids", _list(pa.int32()), nullable=False),),
}
_SPLIT = (
    "prompt_ids",
    "response_ids",
    "response_logprobs",
    "entry_ids",
    "entry_logprob_steps",
    "log_remainder",
    "sampling_logprobs",
    "between_ids",
    "teacher_prompt_ids",
)
DICTIONARY_COLUMNS = ["origin", "finish_reason"]


def column_encodings(schema: pa.Schema) -> dict[str, str]:
    """Encodings that every Parquet reader supports: 2.3 to 2.8 bytes an entry with zstd (docs/cache-format.md)."""
    return {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in _SPLIT if name in schema.names}


def format_of(kind: str, identities: Mapping[str, Any]) -> int:
    """The format that a cache or round is written in: 1, or 2 for rounds and for caches with extra columns."""
    return 2 if kind == "round" or identities.get("layout", {}).get("columns") else 1


def is_row_schema(schema: pa.Schema) -> bool:
    """Whether a shard has the columns of a cache or a round, with or without extra ones."""
    expected = ROUND_SCHEMA if "sampling_logprobs" in schema.names else ROW_SCHEMA
    return bool(schema.equals(_with_extra(expected, schema.names)))


def _with_extra(schema: pa.Schema, names: Collection[str]) -> pa.Schema:
    """`schema` with the extra columns that `names` has."""
    for fields in EXTRA_COLUMNS.values():
        if fields[0].name in names:
            for field in fields:
                schema = schema.append(field)
    return schema


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """A row before the engine has seen it; `index` is its position among the rows of its part.

    `response_ids` are all tokens after the prompt, those between its `spans` included; `spans` are (start, length),
    counted from the first token of the prompt: empty for a whole response, None in a cache without spans.
    `teacher_prompt_ids` are what the teacher is asked with; None where that is `prompt_ids` in every row of the cache.
    `failed` is the reason why an earlier stage could not make the row: it becomes a failed row without an engine.
    `sampling_logprobs` and `cached_sampling_logprob` are of rows of a round; see `CachedRow`. `question` is what the
    teacher is asked with, as text too. `drops_thinking`: what the response has of it becomes part of the teacher's
    prompt.
    """

    index: int
    example_id: str
    sample: int
    origin: Origin
    prompt: str
    prompt_ids: Sequence[int]
    seed: int = 0
    response_ids: Sequence[int] | None = None
    finish_reason: Literal["stop", "length"] = "stop"
    failed: str | None = None
    sampling_logprobs: Sequence[float] | None = None
    cached_sampling_logprob: float | None = None
    spans: Sequence[Sequence[int]] | None = None
    teacher_prompt_ids: Sequence[int] | None = None
    question: EncodedPrompt | None = None
    drops_thinking: bool = False

    @property
    def asked_ids(self) -> Sequence[int]:
        """The prompt that the teacher gets."""
        return self.prompt_ids if self.teacher_prompt_ids is None else self.teacher_prompt_ids

    def in_spans(self, num_tokens: int) -> np.ndarray:
        """Which of the `num_tokens` tokens after the prompt are learnt from."""
        mask = np.full(num_tokens, not self.spans)
        for start, length in self.spans or ():
            begin = start - len(self.prompt_ids)
            mask[begin : begin + length] = True
        return mask

    def as_failed(self, reason: str) -> dict[str, Any]:
        """This row in the list of failed rows."""
        return {"example_id": self.example_id, "sample": self.sample, "origin": self.origin, "reason": reason}


@dataclass(frozen=True, slots=True)
class CachedRow:
    """A row read from a cache: T response tokens including the EOS, log-probs in nats, float32.

    `distributions` is None in a cache with top-K 0. Rows of a round since format 2, and live samples, also have
    `sampling_logprobs`: log q0 of each token, where q0 is the distribution that it was drawn from (the student of the
    round at temperature 1, or its mixture with the teacher). `cached_sampling_logprob` is log q0 of the whole response
    of the cache's row with the same key, if the round was built with it.

    A row of a conversation may have several `spans`, (start, length) in the sequence of all its tokens, N of them as
    [N, 2]. The T response tokens are those of all spans, and `between_ids` the tokens between them. `spans` is None for
    one span that follows the prompt. `teacher_prompt_ids` is the prompt under which the teacher answered or scored;
    None for the row's own.
    """

    example_id: str
    sample: int
    origin: str
    finish_reason: str
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    response_logprobs: np.ndarray
    distributions: Distributions | None
    sampling_logprobs: np.ndarray | None = None
    cached_sampling_logprob: float | None = None
    spans: np.ndarray | None = None
    between_ids: np.ndarray | None = None
    teacher_prompt_ids: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """Length of the whole sequence, as the student reads it."""
        between = 0 if self.between_ids is None else len(self.between_ids)
        return len(self.prompt_ids) + len(self.response_ids) + between

    @property
    def asked_ids(self) -> np.ndarray:
        """The prompt that the teacher got."""
        return self.prompt_ids if self.teacher_prompt_ids is None else self.teacher_prompt_ids

    def places(self) -> np.ndarray:
        """Index of each response token in the whole sequence, [T]."""
        if self.spans is None:
            return len(self.prompt_ids) + np.arange(len(self.response_ids))
        return np.concatenate([start + np.arange(length) for start, length in self.spans])

    def sequence_ids(self) -> np.ndarray:
        """The whole sequence: the prompt, and the spans with what is between them."""
        if self.spans is None or self.between_ids is None:
            return np.concatenate([self.prompt_ids, self.response_ids])
        ids, in_span = np.zeros(self.num_tokens, np.int32), np.zeros(self.num_tokens, bool)
        in_span[self.places()] = True
        ids[in_span] = self.response_ids
        ids[~in_span] = np.concatenate([self.prompt_ids, self.between_ids])
        return ids

    def by_span(self) -> list[CachedRow]:
        """A row for each span, whose prompt is everything before it; `sample` counts them."""
        if self.spans is None or len(self.spans) == 1:
            return [self]
        sequence, asked, rows, begin = self.sequence_ids(), self.asked_ids, [], 0
        for number, (start, length) in enumerate(self.spans):
            part = slice(begin, begin + length)
            before = sequence[len(self.prompt_ids) : start]
            rows.append(
                replace(
                    self,
                    sample=number,
                    finish_reason="stop" if number < len(self.spans) - 1 else self.finish_reason,
                    prompt_ids=sequence[:start],
                    response_ids=self.response_ids[part],
                    response_logprobs=self.response_logprobs[part],
                    distributions=None if self.distributions is None else self.distributions.positions(part),
                    sampling_logprobs=None if self.sampling_logprobs is None else self.sampling_logprobs[part],
                    spans=None,
                    between_ids=None,
                    teacher_prompt_ids=np.concatenate([asked, before]),
                )
            )
            begin += length
        return rows


def unscored_row(
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    example_id: str = "",
    sample: int = 0,
    spans: Sequence[Sequence[int]] = (),
) -> CachedRow:
    """A reference response without a teacher's log-probs; with several `spans`, `response_ids` are all that follows."""
    plan = PlannedRow(0, example_id, sample, "reference", "", prompt_ids, spans=spans)
    following = np.asarray(response_ids, np.int32)
    mask = plan.in_spans(len(following))
    several = len(spans) > 1
    return CachedRow(
        example_id=example_id,
        sample=sample,
        origin="reference",
        finish_reason="stop",
        prompt_ids=np.asarray(prompt_ids, np.int32),
        response_ids=following[mask],
        response_logprobs=np.zeros(0, np.float32),
        distributions=None,
        spans=np.asarray(spans, np.int32) if several else None,
        between_ids=following[~mask] if several else None,
    )


def to_table(rows: Sequence[tuple[PlannedRow, EngineResult, str]]) -> pa.Table:
    """The table of a shard from its planned rows, their results and the response texts."""
    schema = ROUND_SCHEMA if any(plan.sampling_logprobs is not None for plan, _, _ in rows) else ROW_SCHEMA
    extra = {
        "span_starts": any(plan.spans is not None for plan, _, _ in rows),
        "teacher_prompt_ids": any(plan.teacher_prompt_ids is not None for plan, _, _ in rows),
    }
    schema = _with_extra(schema, [name for name, wanted in extra.items() if wanted])
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


def select_positions(result: EngineResult, mask_T: np.ndarray) -> EngineResult:
    """`result` at some of its response positions."""
    top = result.distributions
    return replace(
        result,
        response_ids=result.response_ids[mask_T],
        logprobs_T=result.logprobs_T[mask_T],
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
