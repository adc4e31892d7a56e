"""Which tokens of a conversation are the assistant's: by value, for the markup of three model families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.chat_templates import CHATML, LLAMA, QWEN, THINKING, chat_tokenizer
from support.toys import ROOT

from dpkd.core.errors import UserError
from dpkd.core.models import locate_model
from dpkd.core.prompts.control_tokens import TemplateMismatchError
from dpkd.core.prompts.conversations import EncodedResponse, answer_places, history, references
from dpkd.core.prompts.examples import Example, SkippedRow
from dpkd.core.prompts.limits import fitted
from dpkd.core.prompts.sources import iter_examples, open_examples
from dpkd.core.prompts.templates import PromptEncoder

SMOLLM = str(ROOT / "models" / "smollm2-135m-instruct")
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
TALK = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "And twice that?"},
    {"role": "assistant", "content": "It is 8."},
]
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
TOOL_TALK = [
    {"role": "user", "content": "Weather in Rome?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}],
    },
    {"role": "tool", "name": "get_weather", "tool_call_id": "c1", "content": "22 degrees"},
    {"role": "assistant", "content": "It is warm."},
]


def read(write_rows: Any, *rows: dict[str, Any]) -> list[Example | SkippedRow]:
    return list(iter_examples(open_examples(str(write_rows(list(rows))))))


def one(write_rows: Any, **row: Any) -> Example:
    [example] = read(write_rows, row)
    assert isinstance(example, Example), example
    return example


def check(tokenizer: Any, response: EncodedResponse, segments: list[tuple[str, bool]]) -> None:
    """The row's ids and its mask are those of `segments` of text, each encoded alone: (text, whether it is learnt)."""
    ids: list[int] = []
    mask: list[bool] = []
    for text, learnt in segments:
        part = tokenizer.encode(text, add_special_tokens=False)
        ids, mask = ids + part, mask + [learnt] * len(part)
    assert [*response.prompt.ids, *response.ids] == ids[: len(response.prompt.ids) + len(response.ids)]
    assert not any(mask[len(response.prompt.ids) + len(response.ids) :])
    ours = [False] * len(ids)
    for start, length in response.spans:
        ours[start : start + length] = [True] * length
    assert ours == mask


def test_spans_of_smollm2_with_its_own_tokenizer(write_rows: Any) -> None:
    tokenizer = locate_model(SMOLLM, "teacher").tokenizer
    [row] = references(PromptEncoder(tokenizer, "chat"), one(write_rows, messages=TALK), "all")
    segments = [
        (f"{SYSTEM}<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n", False),
        ("4.<|im_end|>", True),
        ("\n<|im_start|>user\nAnd twice that?<|im_end|>\n<|im_start|>assistant\n", False),
        ("It is 8.<|im_end|>", True),
        ("\n", False),
    ]
    check(tokenizer, row, segments)
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert [*row.prompt.ids, *row.ids] == tokenizer.encode(whole, add_special_tokens=False)[:-1]
    assert len(row.spans) == 2


def test_the_copy_of_smollm2s_template_is_that_of_its_tokenizer(write_rows: Any) -> None:
    real, toy = locate_model(SMOLLM, "teacher").tokenizer, chat_tokenizer(CHATML)
    talk = [{"role": "system", "content": "Be brief."}, *TALK]
    for turns in (TALK, talk):
        for opened in (False, True):
            arguments = {"tokenize": False, "add_generation_prompt": opened}
            assert toy.apply_chat_template(turns, **arguments) == real.apply_chat_template(turns, **arguments)


def test_spans_of_qwen_with_tools(write_rows: Any) -> None:
    tokenizer = chat_tokenizer(QWEN)
    [row] = references(PromptEncoder(tokenizer, "chat"), one(write_rows, messages=TOOL_TALK, tools=[WEATHER]), "all")
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    tools = '{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}'
    segments = [
        (
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n# Tools\n\n"
            f"<tools>\n{tools}\n</tools><|im_end|>\n<|im_start|>user\nWeather in Rome?<|im_end|>\n"
            "<|im_start|>assistant\n",
            False,
        ),
        (f"{call}<|im_end|>", True),
        ("\n<|im_start|>user\n<tool_response>\n22 degrees\n</tool_response><|im_end|>\n<|im_start|>assistant\n", False),
        ("It is warm.<|im_end|>", True),
    ]
    check(tokenizer, row, segments)


def test_spans_of_a_template_that_trims_and_has_another_end_token(write_rows: Any) -> None:
    tokenizer = chat_tokenizer(LLAMA, eos="<|eot_id|>")
    talk = [*TOOL_TALK, {"role": "user", "content": " Thanks "}, {"role": "assistant", "content": "Welcome. "}]
    [row] = references(PromptEncoder(tokenizer, "chat"), one(write_rows, messages=talk), "all")

    def head(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    segments = [
        (f"{head('user')}Weather in Rome?<|eot_id|>{head('assistant')}", False),
        ('{"name": "get_weather", "parameters": {"city": "Rome"}}<|eot_id|>', True),
        (f'{head("ipython")}"22 degrees"<|eot_id|>{head("assistant")}', False),
        ("It is warm.<|eot_id|>", True),
        (f"{head('user')}Thanks<|eot_id|>{head('assistant')}", False),
        ("Welcome.<|eot_id|>", True),
    ]
    check(tokenizer, row, segments)


def test_last_learns_from_the_last_turn_only(write_rows: Any) -> None:
    tokenizer = chat_tokenizer(QWEN)
    encoder, example = PromptEncoder(tokenizer, "chat"), one(write_rows, messages=TALK)
    [last], [every] = references(encoder, example), references(encoder, example, "all")
    assert last.spans == every.spans[-1:]
    assert [*last.prompt.ids, *last.ids] == [*every.prompt.ids, *every.ids]
    called = one(write_rows, messages=TOOL_TALK[:2])
    [call] = references(encoder, called)
    assert tokenizer.decode(call.ids) == (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    )


def test_arguments_reach_the_template_and_its_identity(write_rows: Any) -> None:
    """What `--template-arg` of `dpkd cache-teacher`, `train` and `eval` gives to the template."""
    tokenizer = chat_tokenizer(THINKING)
    plain, without = PromptEncoder(tokenizer, "chat"), PromptEncoder(tokenizer, "chat", {"enable_thinking": "false"})
    example = one(write_rows, messages=TALK[:1])
    assert without.prompt(example).text == plain.prompt(example).text + "<think>\n\n</think>\n\n"
    assert plain.identity().keys() == {"name", "sha256"}
    assert without.identity()["sha256"] != plain.identity()["sha256"]
    assert without.identity()["args"] == {"enable_thinking": "false"}
    with pytest.raises(UserError, match="only a chat template has arguments"):
        PromptEncoder(tokenizer, "alpaca", {"enable_thinking": "false"})


def test_a_history_that_the_template_changes_is_no_row_of_all_turns(write_rows: Any) -> None:
    talk = [TALK[0], {"role": "assistant", "content": "<think>\nadd\n</think>\n\n4."}, *TALK[2:]]
    encoder, example = PromptEncoder(chat_tokenizer(THINKING), "chat"), one(write_rows, messages=talk)
    with pytest.raises(TemplateMismatchError, match="once the conversation continues: give --turns last"):
        references(encoder, example, "all")
    assert len(references(encoder, example)) == 1


def test_limits_cut_a_conversation_between_turns_and_a_turn_at_its_end(write_rows: Any) -> None:
    tokenizer = chat_tokenizer(QWEN)
    [row] = references(PromptEncoder(tokenizer, "chat"), one(write_rows, messages=TALK), "all")
    (first, length), (second, _) = row.spans
    assert fitted(row, 400, 100) == row
    before = fitted(row, second - 1, 100)
    assert (before.spans, before.is_cut, before.ids) == (((first, length),), False, row.ids[:length])
    inside = fitted(row, 400, length - 1)
    assert (inside.spans, inside.is_cut, inside.ids) == (((first, length - 1),), True, row.ids[: length - 1])


def test_places_without_an_answer_are_filled_in_order(write_rows: Any) -> None:
    asked = [TALK[0], TALK[2], *TALK[2:], {"role": "user", "content": "Why?"}]
    example = one(write_rows, messages=asked)
    assert answer_places(example) == [1, 2, 3, 5]
    filled = history(example, 5, ["4.", "8!"])
    assert filled.messages is not None
    assert [turn.content for turn in filled.messages] == [
        "What is 2 + 2?", "4.", "And twice that?", "8!", "And twice that?", "It is 8.", "Why?",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (
            [{"role": "robot", "content": "hi"}, *TALK],
            r"line 1: turn 1 of `messages` has an unknown role: found 'rob",
        ),
        ([*TOOL_TALK[:2], *TALK], r"a tool call of `messages` has no result: found role user in turn 3"),
        ([TALK[0], {"role": "tool", "content": "4"}, *TALK[1:]], r"turn 2 of `messages` is the result of no tool call"),
    ],
)
def test_turns_that_make_no_conversation_are_an_error(write_rows: Any, turns: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(write_rows, {"messages": turns})


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([{"role": "user", "content": ["part"]}], "is list, not text"),
        ([TALK[0], {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}], "has no name"),
        ([TALK[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x"}]}], "are not an object"),
        (["hello"], "is str, not an object"),
    ],
)
def test_values_that_cannot_be_used_are_skipped_by_line(write_rows: Any, turns: list[Any], reason: str) -> None:
    [skipped] = read(write_rows, {"messages": turns})
    assert isinstance(skipped, SkippedRow)
    assert reason in skipped.reason


def test_a_template_that_refuses_the_turns_is_named(write_rows: Any) -> None:
    double = [TALK[0], TOOL_TALK[1] | {"tool_calls": TOOL_TALK[1]["tool_calls"] * 2}]
    with pytest.raises(UserError, match=r"refuses line 1: This model only supports single tool-calls"):
        references(PromptEncoder(chat_tokenizer(LLAMA, "<|eot_id|>"), "chat"), one(write_rows, messages=double))
    with pytest.raises(UserError, match=r"does not write the tools of line 1: found no 'get_weather'"):
        references(PromptEncoder(chat_tokenizer(CHATML), "chat"), one(write_rows, messages=TOOL_TALK), "all")


def test_a_tokenizer_with_another_eos_than_its_template_has_no_turn_to_learn_from(write_rows: Any) -> None:
    encoder = PromptEncoder(chat_tokenizer(CHATML, eos="<|endoftext|>"), "chat")
    with pytest.raises(UserError, match=r"does not end an assistant's turn with the tokenizer's EOS: found '4"):
        references(encoder, one(write_rows, messages=TALK), "all")


def test_parquet_rows_have_no_null_keys(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    other = {"name": "sum", "arguments": {"a": 1}}
    second = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [{"id": "c2", "function": other}]}]
    calls = [TOOL_TALK[0], TOOL_TALK[1] | {"tool_calls": [{"function": {"name": "f", "arguments": {"city": "Rome"}}}]}]
    pq.write_table(pa.Table.from_pylist([{"messages": second}, {"messages": calls}]), tmp_path / "rows.parquet")
    first, last = list(iter_examples(open_examples(str(tmp_path / "rows.parquet"))))
    assert isinstance(first, Example)
    assert isinstance(last, Example)
    assert first.turns[1].tool_calls[0] == {"id": "c2", "type": "function", "function": other}
    assert last.turns[1].tool_calls[0]["function"]["arguments"] == {"city": "Rome"}
