"""Answers on disk: one Parquet file per model, data set and seed, with a fingerprint of all inputs.

Until a file is complete, its answers are in a log of JSON lines beside it: a killed run repeats only those in progress.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dpkd.core.files import replacing
from dpkd.core.json_lines import AppendOnlyLines
from dpkd.core.progress import say
from dpkd.core.prompts.thinking import without_thinking
from dpkd.teacher_cache.engines.engine import FinishReason

_FINGERPRINT = b"dpkd.fingerprint"
_SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("response", pa.string(), nullable=False),
        # Parquet returns the field as `element`, whatever its name
        pa.field("response_ids", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: text without special tokens, ids with their EOS, and why it ended.

    Answers from a predictions file are text only: no ids and no finish reason.
    """

    example_id: str
    response: str
    response_ids: list[int]
    finish_reason: FinishReason | None

    @property
    def answer(self) -> str:
        """The text without thinking, which is what is scored and what later questions follow."""
        return without_thinking(self.response)

    @property
    def num_tokens(self) -> int | None:
        """Length in tokens, with EOS; None if only the text is known."""
        return None if self.finish_reason is None else len(self.response_ids)


#: the answers of one model by data set and seed, in the order of the set's examples
ModelAnswers = dict[str, dict[int, list[Answer]]]


def answers_path(folder: Path, model: str, data: str, seed: int) -> Path:
    """The file in `folder` for the answers of one model to one data set with one seed."""
    return folder / model / data / f"seed-{seed}.parquet"


def partial_answers(path: Path, fingerprint: str) -> AppendOnlyLines:
    """The log of answers for the file `path` until it is complete: one line for each `Answer`."""
    return AppendOnlyLines(path.with_suffix(".partial.jsonl"), {"fingerprint": fingerprint})


def write_answers(path: Path, answers: list[Answer], fingerprint: str) -> None:
    """Write `answers` to `path`, completely or not at all, with `fingerprint` in the schema's metadata."""
    columns = {name: [getattr(answer, name) for answer in answers] for name in _SCHEMA.names}
    table = pa.table(columns, schema=_SCHEMA.with_metadata({_FINGERPRINT: fingerprint.encode()}))
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_answers(path: Path, fingerprint: str, example_ids: list[str]) -> list[Answer] | None:
    """The answers at `path`; None if they must be generated: no file, an unreadable one, or one from other inputs.

    The last two print a line, because the user may not expect to repeat the work.
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
    actual = (table.schema.metadata or {}).get(_FINGERPRINT, b"").decode(errors="replace")
    if actual != fingerprint:
        say(
            f"{path} was made by another model, data or settings "
            f"(fingerprint {actual[:12] or 'missing'}, now {fingerprint[:12]}); its answers are generated again"
        )
        return None
    if [answer.example_id for answer in answers] != example_ids:
        say(f"{path} does not have the {len(example_ids)} expected rows; its answers are generated again")
        return None
    return answers
