"""Conversations as questions: each turn of the assistant is one, asked after the model's own earlier answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dpkd.core.prompts.conversations import answer_places, history
from dpkd.core.prompts.examples import Example


@dataclass(frozen=True)
class FollowUp:
    """A question that comes after answers of the model.

    `places` are those of the answers in the turns of `conversation`, and `golds` their references. The question's own
    place is `place`.
    """

    conversation: Example
    place: int
    places: tuple[int, ...]
    golds: tuple[str, ...]

    def asked(self, answers: Sequence[str]) -> Example:
        """The question with the earlier questions and the model's `answers` to them before it."""
        return history(self.conversation, self.place, answers, self.places)


def questions(example: Example, turns: Literal["last", "all"]) -> Iterator[tuple[Example, FollowUp | None]]:
    """The questions of a row: with `last`, or of a row with one answer, the row itself.

    With `all`, the turns of a conversation up to the first without a reference, named `ID/turn-N`; the messages of each
    have no answers, which differ from model to model. Calls of tools are not asked for: they stay as they are given.
    """
    places = answer_places(example) if turns == "all" and example.messages is not None else []
    if len(places) < 2:
        yield example, None
        return
    asked: list[int] = []
    golds: list[str] = []
    for number, place in enumerate(places, start=1):
        turn = example.turns[place] if place < len(example.turns) else None
        given = turn if turn is not None and turn.role == "assistant" else None
        if given is not None and given.tool_calls:
            continue
        gold = given.content if given is not None else "".join(example.turn_references[number - 1 : number])
        before = enumerate(example.turns[:place])
        messages = tuple(turn for index, turn in before if index not in asked or turn.role != "assistant")
        name = f"{example.example_id}/turn-{number}"
        references = (gold,) if gold.strip() else ()
        question = replace(example, example_id=name, messages=messages, references=references, turns=())
        follow = FollowUp(example, place, tuple(asked), tuple(golds)) if asked else None
        yield question, follow
        if not references:
            return
        asked.append(place)
        golds.append(gold)
