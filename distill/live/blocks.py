"""Blocks of steps whose responses are drawn together, and what has to be drawn for one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dpkd.core.identity import derive_seed
from dpkd.core.models import ModelSource
from dpkd.distill.live.store import Drawn
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.row import RowIndex, RowSource
from dpkd.teacher_cache.store.rows import CachedRow, PlannedRow


@dataclass
class Block:
    """The samples of `steps`. `index_of` maps (step, example id, sample number) to an index in `planned`.

    In the end there are `rows`, with None for responses that the teacher could not score, or an `error`.
    """

    steps: Sequence[int]
    planned: list[PlannedRow] = field(default_factory=list)
    index_of: dict[tuple[int, str, int], int] = field(default_factory=dict)
    drawn: list[Drawn] = field(default_factory=list)
    is_drawn: bool = False
    rows: list[CachedRow | None] | None = None
    error: BaseException | None = None

    @property
    def is_over(self) -> bool:
        """Whether the block has its rows, or never will."""
        return self.rows is not None or self.error is not None

    @property
    def is_settled(self) -> bool:
        """Whether nothing more will be drawn for the block."""
        return self.is_drawn or self.is_over


def plan_block(
    rows_of: Mapping[int, Iterable[RowIndex]], rows: RowSource, student: ModelSource, config: TrainConfig
) -> Block:
    """The block of the steps whose rows `rows_of` has, each response planned once."""
    block = Block([*rows_of])
    for step, row_indices in rows_of.items():
        for row_index in row_indices:
            row = rows.row(*row_index).chosen
            for sample in samples_of(row, config):
                key = (step, row.example_id, sample)
                if key in block.index_of:
                    continue
                index = block.index_of[key] = len(block.planned)
                # a seed for every response: what is drawn does not depend on the other rows of its batch
                seed = derive_seed(config.seed, row.example_id, sample, step)
                ids, asked = row.prompt_ids.tolist(), row.teacher_prompt_ids
                prompt = str(student.tokenizer.decode(ids))
                of_teacher = {} if asked is None else {"teacher_prompt_ids": asked.tolist()}
                planned = PlannedRow(index, row.example_id, sample, "student", prompt, ids, seed, **of_teacher)
                block.planned.append(planned)
    return block


def samples_of(row: CachedRow, config: TrainConfig) -> Sequence[int]:
    """Numbers of the samples that are drawn for a row of the cache.

    One with `index`, also where the loss compares no pairs.
    """
    number = config.num_student_samples
    return [row.sample % number] if config.pairing == "index" else range(number)
