"""Answers on disk: one Parquet file a model, data set and seed, which says what made it.

While a file's answers come in they are kept one a line beside it, so that a killed run repeats those under way alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dpkd.core.files import replacing
from dpkd.core.progress import say
from dpkd.teacher_cache.engines.engine import FinishReason

_FINGERPRINT = b"dpkd.fingerprint"
_SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        # named `element` because that is how Parquet hands it back
        pa.field("response_ids", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: text without special tokens, ids with their EOS, and why it ended.

    An answer that was given as text alone has no ids and no reason.
    """

    example_id: str
    response: str
    response_ids: list[int]
    finish_reason: FinishReason | None

    @property
    def num_tokens(self) -> int | None:
        """Length in tokens, EOS included; None where only the text is known."""
        return None if self.finish_reason is None else len(self.response_ids)


def answers_path(folder: Path, model: str, data: str, seed: int) -> Path:
    """Where in `folder` the answers of one model to one data set with one seed stand."""
    return folder / model / data / f"seed-{seed}.parquet"


def write_answers(path: Path, answers: list[Answer], fingerprint: str) -> None:
    """Write `answers` to `path`, whole or not at all; `fingerprint` goes into the schema's metadata."""
    columns = {name: [getattr(answer, name) for answer in answers] for name in _SCHEMA.names}
    table = pa.table(columns, schema=_SCHEMA.with_metadata({_FINGERPRINT: fingerprint.encode()}))
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_answers(path: Path, fingerprint: str, example_ids: list[str]) -> list[Answer] | None:
    """The answers at `path`; None where they must be made: no file, an unreadable one, or another's.

    The last two are said, as the person may not expect work to be done again.
    """
    if not path.exists():
        return None
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        answers = [
            Answer(row["example_id"], row["response"], row["response_ids"], row["finish_reason"])
            for row in table.select(_SCHEMA.names).to_pylist()
        ]
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        say(f"{path} cannot be read ({type(error).__name__}); its answers are generated again")
        return None
    found = (table.schema.metadata or {}).get(_FINGERPRINT, b"").decode(errors="replace")
    if found != fingerprint:
        say(
            f"{path} was made by another model, data or settings "
            f"(fingerprint {found[:12] or 'missing'}, now {fingerprint[:12]}); they are generated again"
        )
        return None
    if [answer.example_id for answer in answers] != example_ids:
        say(f"{path} does not hold the {len(example_ids)} expected rows; its answers are generated again")
        return None
    return answers


class PartialAnswers:
    """The answers of a file that is not complete yet, a line each; the first line is the file's fingerprint."""

    def __init__(self, answers_file: Path, fingerprint: str) -> None:
        self.path = answers_file.with_suffix(".partial.jsonl")
        self._fingerprint = fingerprint
        self._num_bytes = 0  # up to the end of the last whole line

    def read(self, example_ids: Sequence[str]) -> list[Answer | None]:
        """The answers that are there, in the order of `example_ids`; a line cut short and all after it are dropped."""
        found: dict[str, Answer] = {}
        self._num_bytes = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else ()):
            if not line.endswith(b"\n"):
                break
            try:
                value = json.loads(line)
                if number == 0 and value != {"fingerprint": self._fingerprint}:
                    break
                if number > 0:
                    found[value["example_id"]] = Answer(**value)
            except (ValueError, TypeError, KeyError):
                break
            self._num_bytes += len(line)
        return [found.get(example_id) for example_id in example_ids]

    def append(self, answer: Answer) -> None:
        """Add one answer; `read` must have been called before the first."""
        lines = [{"fingerprint": self._fingerprint}] if self._num_bytes == 0 else []
        text = "".join(json.dumps(line) + "\n" for line in (*lines, asdict(answer))).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.truncate(self._num_bytes)
            file.seek(self._num_bytes)
            file.write(text)
        self._num_bytes += len(text)

    def discard(self) -> None:
        """Remove the lines: the whole file is written."""
        self.path.unlink(missing_ok=True)
