"""Select rows of instruction data by the length of their reference response, or write those responses as a corpus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from dpkd.core.errors import UserError
from dpkd.core.files import write_atomic
from dpkd.core.progress import say
from dpkd.core.prompts.examples import Example
from dpkd.core.prompts.sources import iter_examples, open_examples
from dpkd.evaluate.metrics.buckets import num_words
from dpkd.pipelines.commands.options import PrepareConfig


def prepare_data(config: PrepareConfig) -> Path:
    """Write the rows that `config` selects to `config.out`; the path.

    A file that already holds these rows is left alone. Raises `UserError` for a file with other content, for data that
    are not JSONL, and when no row is left.
    """
    if config.data.suffix != ".jsonl":
        raise UserError("only JSON lines can be filtered", found=config.data.name, expected="a .jsonl file")
    if config.data.resolve() == config.out.resolve():
        raise UserError("the output is the data itself", where=config.out, advice="Choose another --out")
    kept = list(kept_rows(config))
    if not kept:
        raise UserError(
            "no row of the data is long enough",
            expected=f"a reference response of {config.min_response_words} words or more",
            where=config.data,
        )
    content = "".join(line + "\n" for line in kept).encode()
    if config.out.exists():
        if not config.out.is_file() or config.out.read_bytes() != content:
            raise UserError("the output exists and holds other rows", where=config.out, advice="Choose another --out")
        say(f"{config.out} is complete")
        return config.out
    write_atomic(config.out, content)
    say(f"{config.out}: {len(kept)} rows of {config.data} with {config.min_response_words} words or more")
    return config.out


def kept_rows(config: PrepareConfig) -> Iterator[str]:
    """The lines to write; raises `UserError` for data that cannot be read."""
    # rows keep all their fields, as they are in the file
    lines = config.data.read_text(encoding="utf-8").split("\n") if config.data.is_file() else []
    num_kept = 0
    first, every = map(int, config.part.split("/"))
    for item in iter_examples(open_examples(str(config.data))):
        if config.limit is not None and num_kept >= config.limit:
            return
        if not isinstance(item, Example) or item.line % every != first % every:
            continue
        references = [text for text in (*item.references, *item.turn_references) if text.strip()]
        if (num_words(references) if references else 0) < config.min_response_words:
            continue
        if config.form == "text" and not references:
            continue
        num_kept += 1
        row = lines[item.line - 1].strip()
        yield row if config.form == "rows" else json.dumps({"text": references[0]}, ensure_ascii=False)
