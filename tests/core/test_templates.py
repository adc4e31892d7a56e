"""Prompts and response ids: the paper's template to the letter, the boundary by value, and one EOS."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpkd.core.errors import UserError
from dpkd.core.models import locate_model
from dpkd.core.prompts.control_tokens import TemplateMismatchError
from dpkd.core.prompts.examples import Example, Message
from dpkd.core.prompts.templates import PromptEncoder


@pytest.fixture(scope="module")
def alpaca(toy_teacher: Path) -> PromptEncoder:
    return PromptEncoder(locate_model(str(toy_teacher), "teacher").tokenizer, "alpaca")


def example(**fields: object) -> Example:
    return Example("e", 1, (), **fields)  # type: ignore[arg-type]


def test_alpaca_is_the_papers_template(alpaca: PromptEncoder) -> None:
    assert alpaca.prompt(example(instruction="Do it.")).text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nDo it.\n\n### Response:\n"
    )
    assert alpaca.prompt(example(instruction="Do it.", input="Here.")).text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nDo it.\n\n### Input:\nHere.\n\n### Response:\n"
    )


def test_braces_in_an_instruction_are_text(alpaca: PromptEncoder) -> None:
    assert "use {input} here" in alpaca.prompt(example(instruction="use {input} here")).text


def test_response_ids_end_in_one_eos_and_give_the_text_back(alpaca: PromptEncoder) -> None:
    prompt = alpaca.prompt(example(instruction="Say it."))
    ids = alpaca.response_ids(prompt, "It is said.")
    assert ids[-1] == alpaca.eos_token_id
    assert ids.count(alpaca.eos_token_id) == 1
    assert alpaca.decode(ids) == "It is said."


def test_a_token_across_the_seam_leaves_the_prompt_as_it_was(alpaca: PromptEncoder) -> None:
    raw = PromptEncoder(alpaca.tokenizer, "raw")
    prompt = raw.prompt(example(prompt="of t"))
    ids = raw.response_ids(prompt, "he")
    # encoded in one piece, prompt and response would share a token
    assert raw.tokenizer.encode("of the")[: len(prompt.ids)] != prompt.ids
    assert raw.decode(prompt.ids + ids[:-1]) == "of the"


def test_chat_uses_the_tokenizers_own_template(alpaca: PromptEncoder) -> None:
    chat = PromptEncoder(alpaca.tokenizer, "chat")
    assert chat.prompt(example(instruction="Hi", input="there")).text == "<|user|>Hi\n\nthere<|end|><|assistant|>"
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    assert chat.prompt(example(messages=turns)).text.startswith("<|user|>a<|end|><|assistant|>b<|end|>")


def test_a_dialogue_does_not_fit_alpaca(alpaca: PromptEncoder) -> None:
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    with pytest.raises(TemplateMismatchError, match="takes one user turn, the row has 3 turns"):
        alpaca.prompt(example(messages=turns))


def test_chat_without_a_template_is_an_error(alpaca: PromptEncoder) -> None:
    import copy

    bare = copy.deepcopy(alpaca.tokenizer)
    bare.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        PromptEncoder(bare, "chat")


def test_identities_tell_templates_apart(alpaca: PromptEncoder) -> None:
    hashes = {PromptEncoder(alpaca.tokenizer, name).identity()["sha256"] for name in ("alpaca", "chat", "raw")}  # type: ignore[arg-type]
    assert len(hashes) == 3
