"""Options of `dpkd cache import`. Imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from dpkd.core.prompts.templates import TemplateName
from dpkd.core.settings import Location, Settings


class ImportConfig(Settings):
    """What to import, and as what."""

    example: ClassVar[str] = "dpkd cache import answers.jsonl --from jsonl --out cache --tokenizer TEACHER"

    source: Path = Field(
        description="a .jsonl file, or a directory of DistillKit's Parquet files",
        json_schema_extra={"positional": "SRC"},
    )
    source_format: Literal["jsonl", "distillkit"] = Field(
        description="jsonl: prompts, responses and OpenAI's log-probs, one row a line; distillkit: compressed logits",
        json_schema_extra={"flag": "from"},
    )
    out: Location = Field(description="directory of the cache, or a URL such as s3://bucket/key")
    tokenizer: str = Field(description="the teacher's tokenizer: a directory or a hub name")
    teacher_name: str = Field("unknown", min_length=1, description="name of the teacher, for the record")
    template: TemplateName = Field(
        "raw", description="with --from jsonl: prompt template of the cache's prompts; raw: as they are"
    )
    compression: Path | None = Field(
        None, description="with --from distillkit: its compression config; none: compression_config.yaml in SRC"
    )
    limit: int | None = Field(None, ge=1, description="import only the first N rows; none: all")
    rows_per_shard: int = Field(128, ge=1, description="rows per shard; an interrupted job repeats unfinished shards")
