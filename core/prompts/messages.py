"""Chat turns of a data row: roles, tool calls and their results, the tools that the row offers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpkd.core.errors import UserError

ROLES = ("system", "user", "assistant", "tool")


class UnusableValueError(ValueError):
    """A row has a value that cannot be used; the text is the reason that its `SkippedRow` gets."""


@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn.

    `tool_calls` are those of an assistant's turn, in the form that chat templates read: `{"type": "function",
    "function": {"name", "arguments"}}` with the arguments as an object. `fields` are the turn's other keys, such as a
    tool turn's `name` and `tool_call_id` or the `reasoning_content` of an assistant's.
    """

    role: str
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    fields: tuple[tuple[str, Any], ...] = ()

    def for_template(self) -> dict[str, Any]:
        """The turn as a chat template reads it."""
        calls = {"tool_calls": list(self.tool_calls)} if self.tool_calls else {}
        return {"role": self.role, "content": self.content} | calls | dict(self.fields)

    def texts(self) -> list[str]:
        """Everything in the turn that a tokenizer will see."""
        others = (*self.tool_calls, *self.fields)
        return [self.content, *(json.dumps(value, ensure_ascii=False, default=str) for value in others)]


def read_messages(value: Any, line: int, where: str, key: str = "messages") -> tuple[Message, ...]:
    """The turns of `value`.

    Raises `UnusableValueError` for a value that is no list of turns with text. Raises `UserError` for an unknown role,
    a tool call without its result and a result without its call: such a file is not what the caller thinks it is.
    """
    value = _parsed(value) if isinstance(value, str) else value
    if not isinstance(value, list) or not value:
        raise UnusableValueError(f"`{key}` is not a list of turns")
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise UnusableValueError(f"turn {number} of `{key}` is {type(turn).__name__}, not an object")
        turns.append(_read_turn(turn, f"line {line}: turn {number} of `{key}`", where))
    _check_tool_turns(turns, line, where, key)
    return tuple(turns)


def read_questions(value: Any, references: Any) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The questions of a row of `turns`, as turns of the user, and the reference answer to each where it has them."""
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise UnusableValueError("`turns` is not a list of questions")
    if not value:
        raise UnusableValueError("`turns` has no question")
    answers = [] if references is None else references
    if not isinstance(answers, list) or not all(isinstance(text, str) for text in answers):
        raise UnusableValueError("`reference` is not a list with an answer to each of the `turns`")
    return tuple(Message("user", text) for text in value), tuple(answers[: len(value)])


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """The functions that a row offers the model: a list of objects, or such a list as JSON text."""
    if value in (None, "", []):
        return ()
    value = _parsed(value) if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UnusableValueError("`tools` is not a list of objects")
    return tuple(_without_null(tool) for tool in value)


def _read_turn(turn: dict[str, Any], which: str, where: str) -> Message:
    role = turn.get("role")
    if role not in ROLES:
        raise UserError(
            f"{which} has an unknown role",
            found=repr(role),
            expected=" or ".join(ROLES),
            where=where,
            advice="Rename the role in the data",
        )
    calls = tuple(_read_call(call, which) for call in turn.get("tool_calls") or ())
    if calls and role != "assistant":
        raise UnusableValueError(f"{which} calls a tool, but its role is {role}")
    content = turn.get("content")
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise UnusableValueError(f"the content of {which.partition(': ')[2]} is {type(content).__name__}, not text")
    known = ("role", "content", "tool_calls")
    fields = {key: value for key, value in turn.items() if key not in known and value is not None}
    return Message(role, content, calls, tuple(fields.items()))


def _read_call(call: Any, which: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise UnusableValueError(f"a tool call of {which} has no name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments)  # services send them as JSON text; templates write the object
    if not isinstance(arguments, dict):
        raise UnusableValueError(f"the arguments of a tool call of {which} are not an object")
    identity = {"id": call["id"]} if call.get("id") else {}
    return {"type": "function", "function": {"name": name, "arguments": _without_null(arguments)}} | identity


def _check_tool_turns(turns: Sequence[Message], line: int, where: str, key: str) -> None:
    """Each call has one result, which follows it at once; only the last turn's calls may be open."""
    open_calls = 0
    for number, turn in enumerate(turns, start=1):
        if turn.role == "tool":
            if not open_calls:
                raise UserError(
                    f"line {line}: turn {number} of `{key}` is the result of no tool call",
                    found="role tool",
                    expected="an assistant's turn with `tool_calls` before it",
                    where=where,
                    advice="Add the call to the data, or leave the row out",
                )
            open_calls -= 1
            continue
        if open_calls:
            raise UserError(
                f"line {line}: a tool call of `{key}` has no result",
                found=f"role {turn.role} in turn {number}",
                expected=f"role tool, {open_calls} more result" + ("s" if open_calls > 1 else ""),
                where=where,
                advice="Add a tool turn for each call, or leave the row out",
            )
        open_calls = len(turn.tool_calls)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _without_null(value: Any) -> Any:
    """`value` without keys that are null: a Parquet file gives every object the keys of all."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value
