"""What a cache will have: its parts, whose rows are asked together, and the skipped rows of the data."""

from __future__ import annotations

from dataclasses import dataclass, field

from dpkd.core.prompts.examples import SkippedRow
from dpkd.core.prompts.limits import TextCounts
from dpkd.teacher_cache.store.rows import Origin


@dataclass(frozen=True)
class Part:
    """Rows that are asked together: those of an origin, or of the teacher for turn `turn` (from 1) of conversations."""

    origin: Origin
    turn: int = 1

    @property
    def note(self) -> str:
        """The turn as the end of a label, after the first one."""
        return "" if self.turn == 1 else f", turn {self.turn}"

    @property
    def stem(self) -> str:
        """How the names of the part's shards begin."""
        return self.origin if self.turn == 1 else f"{self.origin}_turn{self.turn}"


@dataclass(frozen=True)
class Survey:
    """How many rows each part will have, and the skipped rows of the data.

    `has_spans`: some row has several spans. `has_teacher_prompts`: the teacher is asked under another prompt somewhere.
    `has_turns`: some conversation is asked turn by turn, so that its rows are named `ID/turn-N`. `has_tools`: some row
    offers tools. `text`: rows whose text is not taken as it is.
    """

    num_rows: dict[Part, int]
    skipped: list[SkippedRow]
    has_spans: bool = False
    has_teacher_prompts: bool = False
    has_turns: bool = False
    has_tools: bool = False
    text: TextCounts = field(default_factory=TextCounts)

    def by_origin(self) -> dict[Origin, int]:
        """Rows of each origin."""
        totals: dict[Origin, int] = {}
        for part, number in self.num_rows.items():
            totals[part.origin] = totals.get(part.origin, 0) + number
        return totals

    def in_order(self) -> list[tuple[Part, int]]:
        """The parts and their rows: the teacher's turn by turn, because a turn may need the answers to earlier ones."""
        return sorted(self.num_rows.items(), key=lambda item: (item[0].origin != "teacher", item[0].turn))

    @property
    def generation_identity(self) -> dict[str, str]:
        """What a cache records of its turns; nothing where each row is asked once and has one span."""
        return {"turns": "all"} if self.has_turns or self.has_spans else {}

    @property
    def layout_identity(self) -> dict[str, list[str]]:
        """What a cache records of its extra columns, if it has any."""
        extra = {"spans": self.has_spans, "teacher_prompt": self.has_teacher_prompts}
        columns = [name for name, has in extra.items() if has]
        return {"columns": columns} if columns else {}
