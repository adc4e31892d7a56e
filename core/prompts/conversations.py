"""Conversations as token ids: which tokens are the assistant's, and what each of its turns is asked under.

A span is one turn of the assistant: its tokens up to and including the end token. Where a span starts and ends is read
from the chat template itself, by rendering the conversation up to the turn and with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dpkd.core.errors import UserError
from dpkd.core.prompts.control_tokens import TemplateMismatchError
from dpkd.core.prompts.examples import Example
from dpkd.core.prompts.messages import Message
from dpkd.core.prompts.templates import EncodedPrompt, PromptEncoder, chat_turns
from dpkd.core.prompts.thinking import without_thinking

Turns = Literal["last", "all"]


@dataclass(frozen=True, slots=True)
class EncodedResponse:
    """What follows `prompt` in a row: `ids` up to the end of the last span.

    `spans` are (start, length) of the assistant's turns, counted from the first token of the prompt. The ids outside of
    them are other people's turns, which are never learnt from. `is_cut`: the last span ends at a limit.
    """

    prompt: EncodedPrompt
    ids: list[int]
    spans: tuple[tuple[int, int], ...]
    is_cut: bool = False


def references(
    encoder: PromptEncoder, example: Example, turns: Turns = "last", prompt: EncodedPrompt | None = None
) -> list[EncodedResponse]:
    """The given responses of a row: one for each reference, or with `turns` all one for the whole conversation.

    `prompt` is that of the row, if it is known. Raises `TemplateMismatchError` for a row that the template cannot hold,
    and if it renders a turn differently once the conversation continues.
    """
    places = [place for place, turn in enumerate(example.turns) if turn.role == "assistant"]
    if turns == "all" and places and places != [len(example.turns) - 1]:
        return [_conversation(encoder, example, places)]
    prompt = prompt or encoder.prompt(example)
    last = example.turns[-1] if example.turns else None
    if last is not None and last.role == "assistant" and (last.tool_calls or "reasoning_content" in dict(last.fields)):
        answer = _text_of_turn(encoder, example, len(example.turns) - 1, prompt.marked)
        return [_one_span(prompt, encoder.response_ids(prompt, answer))]
    return [_one_span(prompt, encoder.response_ids(prompt, reference)) for reference in example.references]


def answer_places(example: Example) -> list[int]:
    """Where the assistant speaks in the row's conversation: indices of its turns, and of the places without one.

    A place without a turn is after a user's (or a tool's) turn that another user's turn, or nothing, follows.
    """
    turns = example.turns or chat_turns(example)
    places = []
    for place, turn in enumerate((*turns, None)):
        before = turns[place - 1].role if place else None
        is_open = before in ("user", "tool") and (turn is None or turn.role == "user")
        if is_open or (turn is not None and turn.role == "assistant"):
            places.append(place)
    return places


def history(example: Example, place: int, answers: Sequence[str], places: Sequence[int] | None = None) -> Example:
    """The row as it is asked at `place`. `answers` stand at `places`; None: at those before it that have no turn."""
    turns = example.turns or chat_turns(example)
    given = dict(zip(open_places_before(example, place) if places is None else places, answers, strict=True))
    filled = []
    for index, turn in enumerate(turns[:place]):
        if index in given:
            filled.append(Message("assistant", given[index]))
        if index not in given or turn.role != "assistant":
            filled.append(turn)
    return replace(example, messages=tuple(filled), instruction=None, prompt=None, references=(), turns=())


def open_places_before(example: Example, place: int) -> list[int]:
    """The places before `place` where the row has no turn of the assistant."""
    turns = example.turns or chat_turns(example)
    return [other for other in answer_places(example) if other < place and turns[other].role != "assistant"]


def without_thoughts(example: Example) -> Example:
    """The row without the thinking in its answers and references."""

    def plain(turn: Message) -> Message:
        fields = tuple((key, value) for key, value in turn.fields if key != "reasoning_content")
        return (
            replace(turn, content=without_thinking(turn.content), fields=fields) if turn.role == "assistant" else turn
        )

    references = (without_thinking(text) for text in example.references)
    return replace(
        example,
        references=tuple(text for text in references if text.strip()),
        messages=None if example.messages is None else tuple(map(plain, example.messages)),
        turns=tuple(map(plain, example.turns)),
    )


def _conversation(encoder: PromptEncoder, example: Example, places: Sequence[int]) -> EncodedResponse:
    if encoder.template != "chat":
        raise TemplateMismatchError(f"template {encoder.template} takes one user turn, not a conversation")
    prompt, text = None, ""
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for place in places:
        head = encoder.render(example, example.turns[:place], open_turn=True)
        if not head.startswith(text):
            raise _differs(place)
        ids = _continued(encoder, ids, text, head)
        before = encoder.encoded(head, ids)
        prompt = prompt or before
        answer = _text_of_turn(encoder, example, place, head)
        span = encoder.response_ids(before, answer)
        spans.append((len(ids), len(span)))
        ids, text = [*ids, *span], head + answer + encoder.control.eos
    assert prompt is not None
    return EncodedResponse(prompt, ids[len(prompt.ids) :], tuple(spans))


def _continued(encoder: PromptEncoder, ids: list[int], text: str, longer: str) -> list[int]:
    """Ids of `longer`, which continues `text` of `ids`: as it is encoded as a prompt, unless that changes `ids`."""
    whole = encoder.encode(longer)
    return whole if whole[: len(ids)] == ids else [*ids, *encoder.encode(longer[len(text) :])]


def _text_of_turn(encoder: PromptEncoder, example: Example, place: int, head: str) -> str:
    """Marked text that the template writes for the assistant's turn at `place` after `head`, without the end token."""
    whole = encoder.render(example, example.turns[: place + 1], open_turn=False)
    if not whole.startswith(head):
        raise _differs(place)
    text, eos = whole[len(head) :], encoder.control.eos
    answer, end, rest = text.rpartition(eos)
    if not end or rest.strip():
        raise UserError(
            "the chat template does not end an assistant's turn with the tokenizer's EOS",
            found=repr(encoder.control.plain(text)[-24:]),
            expected=repr(encoder.tokenizer.eos_token),
            where=encoder.tokenizer.name_or_path,
            advice="Give a tokenizer whose EOS is the end token of its template, or rows without tool calls and with "
            "--turns last",
        )
    return answer


def _one_span(prompt: EncodedPrompt, ids: list[int]) -> EncodedResponse:
    return EncodedResponse(prompt, ids, ((len(prompt.ids), len(ids)),))


def _differs(place: int) -> TemplateMismatchError:
    return TemplateMismatchError(
        f"the template changes what comes before turn {place + 1} once the conversation continues: give --turns last"
    )
