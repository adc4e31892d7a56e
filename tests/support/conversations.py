"""A toy teacher with a chat template that knows turns and tools, and conversations for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.chat_templates import QWEN, chat_tokenizer
from support.toys import make_toy

WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}


def say(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def conversations() -> list[dict[str, Any]]:
    """Rows of one, two and three answers, one of them with a tool call, and one whose first question is open."""
    short = [say("user", "What is the capital of Italy?"), say("assistant", "Rome.")]
    more = [say("user", "And its river?"), say("assistant", "The Tiber.")]
    tools = [say("user", "Weather in Rome?"), say("assistant", "", tool_calls=[CALL]), say("tool", "22 degrees")]
    return [
        {"id": "one", "messages": short},
        {"id": "two", "messages": [*short, *more]},
        {"id": "tools", "messages": [*tools, say("assistant", "It is warm."), *more], "tools": [WEATHER]},
        {"id": "open", "messages": [short[0], more[0]]},
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_models(directory: Path) -> tuple[Path, Path]:
    """A teacher and a student."""
    directory.mkdir(exist_ok=True)
    tokenizer = directory / "tokenizer"
    chat_tokenizer(QWEN, directory=tokenizer)
    teacher = make_toy(directory / "teacher", tokenizer, layers=2, seed=1)
    student = make_toy(directory / "student", tokenizer, layers=1, seed=2)
    for model in (teacher, student):
        for name in ("config.json", "generation_config.json"):
            file = model / name
            values = json.loads(file.read_text()) | {"eos_token_id": 1, "pad_token_id": 1}
            file.write_text(json.dumps(values))
    return teacher, student
