"""Datasets of DistillKit: whole texts as token ids, with compressed log-probs (docs/importing.md)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from pydantic import ValidationError

from dpkd.core.errors import UserError, first_line
from dpkd.core.identity import file_sha256, fingerprint
from dpkd.core.models import ModelSource
from dpkd.teacher_cache.build.importing.distillkit_codec import (
    Compression,
    LegacyCompression,
    decode_legacy,
    decode_new,
)
from dpkd.teacher_cache.build.importing.source import ImportedRow, SourceFacts
from dpkd.teacher_cache.engines.engine import EngineResult
from dpkd.teacher_cache.engines.top_k import from_top_k
from dpkd.teacher_cache.options.derive import ImportConfig

_CONFIG = "compression_config.yaml"
#: columns of each form
_NEW, _LEGACY, _PLAIN = (
    ("compressed_logprobs", "bytepacked_indices"),
    ("packed_indices", "exact_values", "coeffs"),
    ("token_ids", "top_values"),
)
_MOST_MASS = 1.0 + 1e-5


class DistillKitSource:
    """A directory of Parquet files. Raises `UserError` if they, or the compression config, cannot be read."""

    def __init__(self, config: ImportConfig, model: ModelSource) -> None:
        if config.template != "raw":
            raise UserError("--template goes with --from jsonl: these rows are token ids", found=config.template)
        self._config, self._model = config, model
        self._files = sorted(config.source.rglob("*.parquet")) if config.source.is_dir() else [config.source]
        if not self._files or not all(map(Path.is_file, self._files)):
            raise UserError("the source has no Parquet files", where=config.source, advice="Give DistillKit's output")
        try:
            names = set(pq.read_schema(self._files[0]).names)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"the file is not Parquet: {first_line(error)}", where=self._files[0]) from None
        forms = [form for form in (_NEW, _LEGACY, _PLAIN) if {"input_ids", *form} <= names]
        if not forms:
            raise UserError(
                "the files are not DistillKit's",
                found=f"columns {', '.join(sorted(names))}",
                expected=f"input_ids with {' and '.join(_NEW)}",
                where=self._files[0],
            )
        self._form = forms[0]
        self._compression = None if self._form == _PLAIN else self._read_compression()
        self._stops = model.stop_token_ids()
        is_exact = isinstance(self._compression, Compression) and self._compression.is_exact
        # a token of the text that is not among the K has no log-prob
        self.unknown = ("responses",) if is_exact or self._form == _PLAIN else ("responses", "remainder")

    def _read_compression(self) -> Compression | LegacyCompression:
        path = self._config.compression or self._config.source / _CONFIG
        kind = Compression if self._form == _NEW else LegacyCompression
        try:
            return kind.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except OSError:
            raise UserError(
                "the compression config is missing, and the log-probs cannot be read without it",
                where=path,
                advice="Give --compression FILE: the logprob_compressor section of the dataset's training config",
            ) from None
        except (ValidationError, yaml.YAMLError) as error:
            raise UserError(f"the compression config cannot be used: {first_line(error)}", where=path) from None

    def _sha256(self) -> str:
        config = None if self._compression is None else self._compression.model_dump(mode="json")
        return fingerprint([[(file.name, file_sha256(file)) for file in self._files], config])

    def check_unchanged(self) -> None:
        if self._sha256() != self._data["sha256"]:
            raise UserError("the files changed while they were imported", where=self._config.source)

    def facts(self) -> SourceFacts:
        self._data = {"name": self._config.source.name, "sha256": self._sha256()}
        self._check_size()
        lengths: list[int] = []
        for batch in self._batches(("input_ids",)):
            lengths += pc.list_value_length(batch["input_ids"]).to_pylist()
        lengths = lengths[: self._config.limit]
        return SourceFacts(
            num_rows=len(lengths),
            top_k=self._first_length("token_ids") if self._compression is None else self._compression.k,
            longest_prompt=1,
            longest_response=max(lengths, default=1) - 1,
            unknown=self.unknown,
            template={"name": "unknown", "sha256": "unknown"},
            data=self._data,
        )

    def _check_size(self) -> None:
        """Raise `UserError` if the compression config describes another size than that of the first position."""
        if not isinstance(self._compression, Compression):
            return
        if (size := self._first_length("compressed_logprobs")) not in (0, self._compression.num_bytes):
            raise UserError(
                "the compression config is not that of the files",
                found=f"{self._compression.num_bytes} bytes per position",
                expected=size,
                where=self._config.compression or self._config.source / _CONFIG,
                advice="Give --compression FILE: the config that the files were written with",
            )

    def _first_length(self, column: str) -> int:
        """How many values the first position has; 0 without one."""
        rows = (row for batch in self._batches((column,)) for row in batch[column].to_pylist())
        return next((len(row[0]) for row in rows if row), 0)

    def rows(self) -> Iterator[ImportedRow]:
        index = 0
        for batch in self._batches(("input_ids", *self._form)):
            for row in batch.to_pylist():
                yield self._row(f"row-{index:08d}", row)
                index += 1

    def _batches(self, columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
        for path in self._files:
            try:
                yield from pq.ParquetFile(path).iter_batches(batch_size=16, columns=list(columns))
            except (pa.ArrowException, OSError, KeyError) as error:
                raise UserError(f"the file cannot be read: {first_line(error)}", where=path) from None

    def _row(self, name: str, row: dict[str, Any]) -> ImportedRow:
        ids = [int(token) for token in row["input_ids"]]
        try:
            top_ids_TK, logprobs_TK = self._decoded(row)
            num = min(len(top_ids_TK), len(ids) - 1)  # the last token may have no successor, or no log-probs
            num -= self._num_padded(ids[: num + 1])
            if num < 1:
                raise ValueError("it has no token with log-probs")
            return self._imported(name, ids[: num + 1], top_ids_TK[:num], logprobs_TK[:num])
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            return ImportedRow(name, "", [], None, f"the row cannot be used: {first_line(error)}")

    def _decoded(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        columns = {key: list(islice(row[key], len(row["input_ids"]))) for key in self._form}
        if isinstance(self._compression, Compression):
            ids_TK, logprobs_TK = decode_new(columns, self._compression)
        elif self._compression is not None:
            ids_TK, logprobs_TK = decode_legacy(columns, self._compression)
        else:
            ids_TK = np.array(columns["token_ids"], np.int64)
            logprobs_TK = np.array(columns["top_values"], np.float32)
        order_TK = np.argsort(-logprobs_TK, axis=1, kind="stable")  # an approximation may not fall from rank to rank
        return np.take_along_axis(ids_TK, order_TK, axis=1), np.take_along_axis(logprobs_TK, order_TK, axis=1)

    def _num_padded(self, ids: list[int]) -> int:
        """1 if the text ends with a token that DistillKit added to have log-probs of the last one, else 0."""
        pad = self._model.tokenizer.pad_token_id
        after_end = len(ids) > 1 and ids[-1] in self._stops and ids[-2] in self._stops
        return int(after_end or (ids[-1] == pad and pad not in self._stops))

    def _imported(self, name: str, ids: list[int], top_ids_TK: np.ndarray, logprobs_TK: np.ndarray) -> ImportedRow:
        vocab_size = self._model.vocab_size
        if max(ids) >= vocab_size or top_ids_TK.min() < 0 or top_ids_TK.max() >= vocab_size:
            raise ValueError(f"an id is outside the tokenizer's {vocab_size}: is it the teacher's?")
        if np.isnan(logprobs_TK).any():
            raise ValueError("a log-prob is not a number")
        mass_T1 = np.exp(logprobs_TK.astype(np.float64)).sum(axis=1, keepdims=True)
        if mass_T1.max() > _MOST_MASS:
            if "remainder" not in self.unknown:
                raise ValueError(f"the probabilities of a position sum to {mass_T1.max():.4f}: these are no log-probs")
            # approximated values: only their ratios count then
            logprobs_TK = (logprobs_TK - np.log(np.maximum(mass_T1, 1.0))).astype(np.float32)
        response_ids = np.array(ids[1:], np.int32)
        nothing_T = np.full(len(response_ids), -np.inf, np.float32)
        top = from_top_k(top_ids_TK, logprobs_TK, response_ids, nothing_T, vocab_size)
        reason = "stop" if ids[-1] in self._stops else "length"
        result = EngineResult(0, response_ids, reason, np.zeros(0, np.float32), top)  # type: ignore[arg-type]
        return ImportedRow(name, self._model.decode(ids[:1]), ids[:1], result)
