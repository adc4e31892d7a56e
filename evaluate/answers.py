"""Generated answers on disk: one Parquet file a model, data set and seed, which says what made it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dpkd.teacher_cache.engine import FinishReason
from dpkd.teacher_cache.files import replacing
from dpkd.teacher_cache.progress import say

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
    """One generated answer: text without special tokens, ids with their EOS, and why it ended."""

    example_id: str
    response: str
    response_ids: list[int]
    finish_reason: FinishReason

    @property
    def num_tokens(self) -> int:
        """Length in tokens, EOS included."""
        return len(self.response_ids)


def answers_path(out: Path, model: str, data: str, seed: int) -> Path:
    """Where the answers of one model to one data set with one seed stand."""
    return out / "generations" / model / data / f"seed-{seed}.parquet"


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
