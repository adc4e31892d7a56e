"""Options of `dpkd prepare-data`. Imports nothing heavy: the command line reads it for `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from dpkd.core.settings import Settings


class PrepareConfig(Settings):
    """Which rows of instruction data are kept, and as what."""

    data: Path = Field(description="instruction data, .jsonl")
    out: Path = Field(description="file to write, .jsonl")
    min_response_words: int = Field(
        1, ge=1, description="rows whose gold response has fewer white-space words are left out; the paper's is 11"
    )
    limit: int | None = Field(None, ge=1, description="only the first so many rows that are kept; off: all")
    form: Literal["rows", "text"] = Field(
        "rows",
        description="rows: kept as they are; text: their gold responses alone, as a corpus for train's lm_data",
    )
