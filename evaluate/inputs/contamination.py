"""Rows of an evaluation set whose prompt also stands in the training data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpkd.core.progress import say
from dpkd.core.prompts.examples import Example, open_examples
from dpkd.evaluate.inputs.eval_sets import EvalSet


def count_duplicates(train_data: str, eval_sets: Sequence[EvalSet]) -> dict[str, Any]:
    """The training data's identity and, for each set, the ids of the rows whose prompt it holds.

    Prompts are the same when instruction and input (or all turns) are, white space squeezed and case aside.
    """
    source = open_examples(train_data)
    held = {_key(item) for item in source if isinstance(item, Example)}
    rows = {
        eval_set.name: [example.example_id for example in eval_set.examples if _key(example) in held]
        for eval_set in eval_sets
    }
    for name, found in rows.items():
        say(f"data {name}: {len(found)} prompts also stand in the training data {train_data}")
    return {"train_data": source.identity, "rows": rows}


def _key(example: Example) -> str:
    if example.messages is not None:
        parts = [turn.content for turn in example.messages if turn.role != "system"]
    else:
        parts = [example.instruction or example.prompt or "", example.input]
    return " ".join(" ".join(parts).lower().split())
