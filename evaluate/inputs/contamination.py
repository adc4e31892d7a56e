"""Contamination: rows of an evaluation set whose prompts the models may have seen in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpkd.core.bridges import load_bridge
from dpkd.core.errors import UserError
from dpkd.core.progress import say
from dpkd.core.prompts.examples import Example
from dpkd.core.prompts.sources import open_examples
from dpkd.evaluate.inputs.eval_sets import EvalSet
from dpkd.evaluate.inputs.models import Candidate


def find_in_cache(
    location: str | None, candidates: Sequence[Candidate], eval_sets: Sequence[EvalSet]
) -> dict[str, Any] | None:
    """`cache`: the fingerprint of the cache at `location`; `rows`: by set, the ids of rows whose prompt is in it.

    None without a location. Raises `UserError` for a cache that cannot be read or compared.
    """
    if location is None:
        return None
    if not candidates:
        raise UserError(
            "comparing prompts with a cache needs the tokenizer of a model, and there is no --model",
            where="--cache",
            advice="Add --model, or give --train-data with the rows of the cache instead",
        )
    contamination: dict[str, Any] = load_bridge("contamination")(location, candidates, eval_sets)
    return contamination


def find_in_train_data(train_data: str | None, eval_sets: Sequence[EvalSet]) -> dict[str, Any] | None:
    """`train_data`: the identity of the training data; `rows`: by set, the ids of rows whose prompt is in it.

    Prompts are equal if instruction and input (or all turns) are, ignoring white space and case. None without data.
    """
    if train_data is None:
        return None
    source = open_examples(train_data)
    trained_on = {_key(item) for item in source if isinstance(item, Example)}
    rows = {
        eval_set.name: [example.example_id for example in eval_set.examples if _key(example) in trained_on]
        for eval_set in eval_sets
    }
    for name, ids in rows.items():
        say(f"data {name}: {len(ids)} prompts are also in the training data {train_data}")
    return {"train_data": source.identity, "rows": rows}


def _key(example: Example) -> str:
    if example.messages is not None:
        parts = [turn.content for turn in example.messages if turn.role != "system"]
    else:
        parts = [example.instruction or example.prompt or "", example.input]
    return " ".join(" ".join(parts).lower().split())
