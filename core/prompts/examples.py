"""Rows of data as examples: instructions, chats and bare prompts; each row left out has its line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.prompts.messages import Message, UnusableValueError, read_messages, read_questions, read_tools


@dataclass(frozen=True, slots=True)
class Example:
    """One row of data. Exactly one of `instruction`, `messages`, `prompt` is set; `turns` of a row become messages.

    `references` holds the accepted answers (none, one or several); `line` counts from 1. `messages` are the turns
    before the one to answer; `turns` is the whole conversation, with the assistant's last turn where the row has it.
    `tools` are the functions that the row offers. `teacher_messages` and `teacher_prompt` are what the teacher is asked
    with instead of the row's own turns or text. `turn_references` are the answers to each of several questions.
    """

    example_id: str
    line: int
    references: tuple[str, ...]
    instruction: str | None = None
    input: str = ""
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    category: str = ""
    turns: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    teacher_messages: tuple[Message, ...] | None = None
    teacher_prompt: str | None = None
    turn_references: tuple[str, ...] = ()

    @property
    def for_teacher(self) -> Example | None:
        """The row as the teacher is asked; None where it is asked as the student is."""
        if self.teacher_messages is not None:
            return replace(self, messages=self.teacher_messages, instruction=None, prompt=None)
        if self.teacher_prompt is None:
            return None
        if self.instruction is None:
            return replace(self, prompt=self.teacher_prompt)
        return replace(self, instruction=self.teacher_prompt)


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """A row that is left out, with its line (from 1) and the reason."""

    line: int
    reason: str


def to_example(row: Any, line: int, name: str) -> Example | SkippedRow:
    """The example in a row of the source `name`, or why it is left out.

    Raises `UserError` for a row of none of the known forms, and RecursionError for one that is nested too deeply.
    """
    if not isinstance(row, dict):
        raise UserError(f"line {line} holds no object", found=type(row).__name__, expected="object", where=name)
    forms = [key for key in ("instruction", "messages", "prompt", "turns") if row.get(key) is not None]
    if not forms:
        raise UserError(
            f"line {line} is without `instruction`",
            found=f"keys {', '.join(map(str, row)) or '(none)'}",
            expected="`instruction`, `messages`, `prompt` or `turns`",
            where=name,
        )
    form = forms[0]
    names = [row[key] for key in ("id", "question_id") if row.get(key) not in (None, "")]
    example_id = str(names[0]) if names else f"line-{line:08d}"
    of_row: dict[str, Any] = {"category": str(row.get("category") or row.get("task") or "")}
    try:
        of_row |= _read_teacher(row, line, name)
        if form == "messages":
            turns = read_messages(row["messages"], line, name)
            messages, references = _split_turns(turns)
            of_row |= {"messages": messages, "turns": turns, "tools": read_tools(row.get("tools"))}
            return Example(example_id, line, references, **of_row)
        if form == "turns":
            questions, answers = read_questions(row["turns"], row.get("reference"))
            last = tuple(answer for answer in answers[len(questions) - 1 :] if answer.strip())
            of_row |= {"messages": questions, "turns": questions, "turn_references": answers}
            return Example(example_id, line, last, **of_row)
        references = _read_references(row)
        text = _read_text(row, form)
        if form == "prompt":
            return Example(example_id, line, references, prompt=text, **of_row)
        extra = row.get("input")
        if extra is not None and not isinstance(extra, str):
            return SkippedRow(line, f"`input` is {type(extra).__name__}, not text")
        return Example(example_id, line, references, instruction=text, input=(extra or "").strip(), **of_row)
    except UnusableValueError as error:
        return SkippedRow(line, str(error))


def _read_teacher(row: dict[str, Any], line: int, name: str) -> dict[str, Any]:
    """What the teacher is asked with, where a row says so."""
    if row.get("teacher_messages") is not None:
        messages, _ = _split_turns(read_messages(row["teacher_messages"], line, name, "teacher_messages"))
        return {"teacher_messages": messages}
    if row.get("teacher_prompt") is None:
        return {}
    if row.get("messages") is not None:
        raise UnusableValueError("a row of `messages` takes `teacher_messages`, not `teacher_prompt`")
    return {"teacher_prompt": _read_text(row, "teacher_prompt")}


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8; half a surrogate pair, which JSON can hold, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_text(row: dict[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise UnusableValueError(f"`{key}` is {type(value).__name__}, not text")
    if not value.strip():
        raise UnusableValueError(f"`{key}` is empty")
    return value


def _read_references(row: dict[str, Any]) -> tuple[str, ...]:
    value = row.get("output")
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise UnusableValueError("`output` is neither text nor a list of texts")
    return tuple(item for item in values if item.strip())


def _split_turns(turns: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The turns before the assistant's last one, and the text of that one."""
    references: tuple[str, ...] = ()
    messages = turns
    if turns[-1].role == "assistant":
        messages, answer = turns[:-1], turns[-1].content
        references = (answer,) if answer.strip() else ()
    last = messages[-1] if messages else None
    if last is None or not (last.role == "tool" or (last.role == "user" and last.content.strip())):
        raise UnusableValueError("`messages` has no user turn to answer")
    return messages, references
