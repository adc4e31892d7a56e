"""The documents of a corpus, from a file or a streamed dataset, and their identity by content."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError, first_line
from dpkd.core.identity import file_sha256, fingerprint
from dpkd.core.json_lines import read_json_lines, read_text_lines
from dpkd.core.prompts.examples import is_unicode
from dpkd.core.prompts.sources import parquet_rows


@dataclass(frozen=True)
class DocumentSource:
    """Documents that can be iterated again and again, always in the same order; empty ones are skipped.

    `identity` holds name and content hash; for a dataset of a hub, the `datasets` library's hash of its revision.
    `num_bytes` is the size of a local file.
    """

    name: str
    identity: dict[str, str]
    documents: Callable[[], Iterator[str]]
    num_bytes: int | None = None


def open_documents(location: str) -> DocumentSource:
    """The documents at `location`, a file or a dataset's name (see `dpkd.distill.rows.corpus.Corpus`).

    Raises `UserError` when there are none. Iterating raises it for a row without text or an unreadable line.
    """
    path = Path(location)
    return _open_local(path) if path.suffix in _READERS or path.is_file() else _open_dataset(location)


def _open_local(path: Path) -> DocumentSource:
    if not path.is_file():
        raise UserError(
            "the corpus is missing", where=path, advice=f"Give a file ({_SUFFIXES}) or the name of a dataset"
        )
    if path.suffix not in _READERS:
        raise UserError("the corpus has an unknown suffix", found=repr(path.suffix), expected=_SUFFIXES, where=path)
    identity = {"name": path.name, "sha256": file_sha256(path)}
    return DocumentSource(str(path), identity, lambda: _READERS[path.suffix](path), path.stat().st_size)


def _open_dataset(location: str) -> DocumentSource:
    import datasets

    name, *rest = location.split(":")
    config, split = ([None] * 2 + rest)[-2:]
    split = split or "train"
    try:
        builder = datasets.load_dataset_builder(name, config)
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:
        raise UserError(
            "the corpus is neither a file nor a dataset that the `datasets` library can stream",
            found=repr(location),
            advice=f"Give a file ({_SUFFIXES}), NAME, NAME:SPLIT or NAME:CONFIG:SPLIT; the library said: "
            f"{first_line(error)}",
        ) from None

    def numbered_rows() -> Iterator[tuple[int, Any]]:
        try:
            yield from enumerate(rows, start=1)
        except Exception as error:
            raise UserError(
                f"the corpus can no longer be read: {first_line(error)}",
                where=location,
                advice="Run the same command again: it resumes from the last checkpoint",
            ) from error

    def documents() -> Iterator[str]:
        return _texts(numbered_rows(), location)

    files = (builder.config.data_files or {}).get(split, [])
    if Path(name).is_dir():  # the library's hash depends on the location and time of the files
        content = fingerprint([[Path(file).name, file_sha256(Path(file))] for file in files])
        return DocumentSource(location, {"name": Path(name).name, "split": split, "sha256": content}, documents)
    identity = {"name": name, "config": config or "", "split": split, "hash": str(builder.hash)}
    return DocumentSource(location, identity, documents)


def _texts(numbered_rows: Iterable[tuple[int, Any]], where: object) -> Iterator[str]:
    """The text of each row, unchanged; rows with nothing but white space are skipped."""
    for line, row in numbered_rows:
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            found = f"keys {', '.join(map(str, row)) or '(none)'}" if isinstance(row, dict) else type(row).__name__
            if isinstance(row, dict) and "text" in row:
                found = f"`text` of type {type(text).__name__}"
            what = f"row {line} of the corpus has no text"
            raise UserError(what, found=found, expected="text in `text`", where=where)
        if not is_unicode(text):
            what = f"the text of row {line} contains half a surrogate pair, which no tokenizer accepts"
            raise UserError(what, where=where)
        if text.strip():
            yield text


def _txt_documents(path: Path) -> Iterator[str]:
    lines = (text for _, text in read_text_lines(path))
    for has_text, document in itertools.groupby(lines, key=lambda line: bool(line.strip())):
        if has_text:
            yield "\n".join(document)


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".jsonl": lambda path: _texts(read_json_lines(path), path),
    ".parquet": lambda path: _texts(parquet_rows(path, {"text"}), path),
    ".txt": _txt_documents,
}
_SUFFIXES = " or ".join(_READERS)
