"""Where rows of data come from: files of three kinds and the `datasets` library, with their identity by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError, first_line
from dpkd.core.identity import file_sha256
from dpkd.core.json_lines import parse_json, read_json_lines
from dpkd.core.prompts.examples import Example, SkippedRow, is_unicode, to_example

#: what rows of data may have
_FIELDS = (
    "id", "question_id", "instruction", "input", "output", "messages", "prompt", "tools", "turns", "reference",
    "category", "task", "teacher_messages", "teacher_prompt",
)  # fmt: skip
_FILE_SUFFIXES = (".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class ExampleSource:
    """Where rows come from: a file, or a name (or directory) that the `datasets` library loads, `NAME[:SPLIT]`.

    `identity` is the content's hash.
    """

    name: str
    identity: dict[str, str]
    path: Path | None = None
    dataset: Any = None
    stamp: tuple[int, int, int] | None = None

    def check_unchanged(self, *, content: bool = False) -> None:
        """Raise `UserError` if the file is not the one that was opened: by its time and size, or by its `content`.

        Rows are read anew at every pass, so a file that changes would pair the prompts of one version with the answers
        to another.
        """
        if self.path is None:
            return
        where, advice = self.path, "Restore the file and run the same command again, or choose another --out"
        if _stamp(self.path) != self.stamp:
            raise UserError("the data file changed while the job ran", where=where, advice=advice)
        if content and (found := file_sha256(self.path)) != self.identity["sha256"]:
            raise UserError(
                "the data file changed while the job ran",
                found=f"sha256 {found[:16]}…",
                expected=f"{self.identity['sha256'][:16]}…",
                where=where,
                advice="Choose another --out: rows of the changed file may be in this one",
            )

    def __iter__(self) -> Iterator[Example | SkippedRow]:
        return iter_examples(self)


def open_examples(data: str) -> ExampleSource:
    """Find the source named `data`; raises `UserError` when there is none."""
    path = Path(data)
    if path.suffix in _FILE_SUFFIXES or path.is_file():
        if not path.is_file():
            raise UserError("the data file is missing", where=path, advice="Give a .json, .jsonl or .parquet file")
        if path.suffix not in _FILE_SUFFIXES:
            raise UserError(
                "the data file has a suffix that is not known",
                found=repr(path.suffix),
                expected=" or ".join(_FILE_SUFFIXES),
                where=path,
            )
        stamp = _stamp(path)
        return ExampleSource(data, {"name": path.name, "sha256": file_sha256(path)}, path=path, stamp=stamp)
    return _open_dataset(data)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Inode, time of change and size; None if the file is missing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _open_dataset(data: str) -> ExampleSource:
    import datasets

    name, _, split = data.partition(":")
    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        raise UserError(
            "the data is neither a file nor a dataset that the `datasets` library can load",
            found=repr(data),
            advice=f"Give a .json, .jsonl or .parquet file, or NAME[:SPLIT]; the library said: {error}",
        ) from None
    # by content: the library's own fingerprint changes with the place of its cache
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=True, default=str).encode() + b"\n")
    # a copy of a directory elsewhere is the same data
    name = Path(data).name if Path(data).is_dir() else data
    return ExampleSource(data, {"name": name, "sha256": digest.hexdigest()}, dataset=dataset)


def iter_examples(source: ExampleSource, limit: int | None = None) -> Iterator[Example | SkippedRow]:
    """Rows in file order, the first `limit` of them.

    Rows whose *values* cannot be used come out as `SkippedRow`. A line that is not JSON, a row without any of
    `instruction`, `messages`, `prompt`, `turns`, and a source without rows raise `UserError`: the file is then not what
    the caller thinks it is.
    """
    seen: set[str] = set()
    line = 0
    for line, row in islice(raw_rows(source), limit):
        try:
            item = to_example(row, line, source.name)
            if isinstance(item, Example) and not is_unicode(json.dumps(asdict(item), ensure_ascii=False, default=str)):
                item = SkippedRow(line, "the text holds half a surrogate pair, which no tokenizer takes")
        except RecursionError:
            item = SkippedRow(line, "a value is nested too deeply")
        if isinstance(item, Example):
            if item.example_id in seen:
                item = SkippedRow(line, f"id {item.example_id!r} is also on an earlier line")
            else:
                seen.add(item.example_id)
        yield item
    if line == 0:
        raise UserError("the data holds no row", where=source.name, advice="Give a file with at least one row")


def raw_rows(source: ExampleSource, other_fields: Iterable[str] = ()) -> Iterator[tuple[int, Any]]:
    """Line (from 1) and content of each row; raises `UserError` for a file that cannot be read.

    Of a Parquet file with columns that rows of data have, only these and `other_fields` are read.
    """
    path = source.path
    if path is None:
        yield from enumerate(source.dataset, start=1)
    elif path.suffix == ".parquet":
        yield from parquet_rows(path, {*_FIELDS, *other_fields})
    elif path.suffix == ".jsonl":
        yield from read_json_lines(path)
    else:
        try:
            rows = parse_json(path.read_text(encoding="utf-8"), path, "the file")
        except json.JSONDecodeError as error:
            raise UserError(f"line {error.lineno} is not JSON: {error.msg}", where=path) from None
        except UnicodeDecodeError as error:
            raise UserError(f"the file is not UTF-8: {error.reason}", where=path) from None
        if not isinstance(rows, list):
            raise UserError("the file holds no list of rows", found=type(rows).__name__, expected="list", where=path)
        yield from enumerate(rows, start=1)


def parquet_rows(path: Path, wanted: Collection[str]) -> Iterator[tuple[int, Any]]:
    """Number (from 1) and content of each row, of the `wanted` columns where the file has some of them.

    Raises `UserError` for a file that cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        # other columns may hold values that Python has no type for
        columns = [name for name in file.schema_arrow.names if name in wanted] or None
        batches = file.iter_batches(batch_size=1024, columns=columns)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except UnicodeDecodeError as error:
        raise UserError(f"a text of the file is not UTF-8: {error.reason}", where=path) from None
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"the file is not Parquet, or is corrupt: {first_line(error)}", where=path) from None
