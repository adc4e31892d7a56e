"""Training rows of instruction data, without a teacher."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource
from dpkd.core.progress import say
from dpkd.core.prompts.examples import SkippedRow
from dpkd.core.prompts.limits import NO_REFERENCE, TextCounts, given_responses, with_progress
from dpkd.core.prompts.sources import open_examples
from dpkd.core.prompts.templates import PromptEncoder
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.row import TrainingRow
from dpkd.distill.rows.vocabulary import check_data
from dpkd.teacher_cache.store.rows import CachedRow, unscored_row


class DataRows:
    """Reference responses of instruction data, encoded in memory, in one group. No teacher has scored them."""

    def __init__(self, rows: list[CachedRow]) -> None:
        self._rows = rows
        self.group_sizes = [len(rows)]
        self.longest = int(self.lengths_by_group()[0].max())

    def row(self, group: int, index: int) -> TrainingRow:
        return TrainingRow(self._rows[index])

    def lengths_by_group(self) -> list[np.ndarray]:
        return [np.array([row.num_tokens for row in self._rows])]


def open_data_rows(
    config: TrainConfig, encoder: PromptEncoder, student: ModelSource
) -> tuple[DataRows, dict[str, str]]:
    """Rows of `config.data`, and the identity of the data. Prints which rows cannot be used, and how many.

    Raises `UserError` when no row can be used, or when text contains ids that the student has no embedding for.
    """
    assert config.data is not None  # the caller's choice
    source = open_examples(config.data)
    rows: list[CachedRow] = []
    skipped: list[SkippedRow] = []
    text = TextCounts()
    for item in with_progress(encoder.in_batches(source, references=True)):
        if isinstance(item, SkippedRow):
            skipped.append(item)
            continue
        text.add(encoder, item, references=True)
        found = given_responses(item, encoder, config.turns, config.max_prompt_tokens, config.max_new_tokens)
        for sample, response in enumerate(found):
            if isinstance(response, SkippedRow):
                skipped.append(response)
            else:
                cached = unscored_row(response.prompt.ids, response.ids, item.example_id, sample, response.spans)
                rows.append(replace(cached, finish_reason="length") if response.is_cut else cached)
        if not found:
            skipped.append(SkippedRow(item.line, NO_REFERENCE))
    text.say()
    for row in skipped[:5]:
        say(f"skipped line {row.line}: {row.reason}")
    if skipped:
        say(f"skipped {len(skipped)} rows of the data")
    if not rows:
        raise UserError("no row of the data can be used", where=config.data)
    check_data(student, rows, config.data)
    return DataRows(rows), source.identity
