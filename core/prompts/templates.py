"""Prompt templates and the one way from an example to token ids, shared by caching, training and evaluation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dpkd.core.errors import UserError
from dpkd.core.prompts.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TemplateName = Literal["alpaca", "chat", "raw"]

# The template of the paper's family (MiniLLM, DPKD), which is Alpaca's.
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


class TemplateMismatchError(ValueError):
    """This example has no form in the chosen template; the text says why."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as text and as the token ids that every stage uses."""

    text: str
    ids: list[int]


class PromptEncoder:
    """Turns examples into prompts and answers into response ids with one tokenizer and one template.

    `alpaca` and `raw` texts are encoded with the tokenizer's own special tokens (a BOS where it has one); the `chat`
    template writes them itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: TemplateName) -> None:
        if template == "chat" and not tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template",
                where=tokenizer.name_or_path,
                advice="Choose --template alpaca or raw",
            )
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token", where=tokenizer.name_or_path)
        self.tokenizer = tokenizer
        self.template = template
        self.eos_token_id = int(tokenizer.eos_token_id)

    def prompt(self, example: Example) -> EncodedPrompt:
        """The prompt of `example`; raises `TemplateMismatchError` for a form that the template cannot hold."""
        text = self._prompt_text(example)
        return EncodedPrompt(text, self._encode(text))

    def response_ids(self, prompt: EncodedPrompt, response: str) -> list[int]:
        """Ids of `response` after `prompt`, EOS appended.

        The text is encoded together with the prompt (as the paper's family does); where a token would straddle the
        seam it is encoded alone, so that the prompt ids are the same in generation, scoring and training.
        """
        ids = self._encode(prompt.text + response)
        if ids[: len(prompt.ids)] == prompt.ids:
            ids = ids[len(prompt.ids) :]
        else:
            ids = list(self.tokenizer.encode(response, add_special_tokens=False))
        return [*ids, self.eos_token_id]

    def decode(self, response_ids: list[int]) -> str:
        """Text of a response, special tokens left out."""
        return str(self.tokenizer.decode(response_ids, skip_special_tokens=True))

    def identity(self) -> dict[str, str]:
        """Name and sha256 of the template's text."""
        text = str(self.tokenizer.chat_template) if self.template == "chat" else _ALPACA + "\0" + _ALPACA_WITH_INPUT
        if self.template == "raw":
            text = "{prompt}"
        return {"name": self.template, "sha256": hashlib.sha256(text.encode()).hexdigest()}

    def _encode(self, text: str) -> list[int]:
        ids = list(self.tokenizer.encode(text, add_special_tokens=self.template != "chat"))
        while ids and ids[-1] == self.eos_token_id and not text.endswith(str(self.tokenizer.eos_token)):
            ids.pop()  # some tokenizers close every text themselves
        return ids

    def _prompt_text(self, example: Example) -> str:
        if self.template == "chat":
            return self._chat_text(example)
        if example.messages is not None:
            if len(example.messages) != 1:
                raise TemplateMismatchError(
                    f"template {self.template} takes one user turn, the row has {len(example.messages)} turns"
                )
            instruction, extra = example.messages[0].content, ""
        else:
            instruction, extra = example.instruction or example.prompt or "", example.input
        if self.template == "raw":
            return f"{instruction}\n{extra}" if extra else instruction
        if extra:
            return _ALPACA_WITH_INPUT.format(instruction=instruction, input=extra)
        return _ALPACA.format(instruction=instruction)

    def _chat_text(self, example: Example) -> str:
        if example.messages is not None:
            turns = [{"role": turn.role, "content": turn.content} for turn in example.messages]
        else:
            content = example.instruction or example.prompt or ""
            if example.input:
                content = f"{content}\n\n{example.input}"
            turns = [{"role": "user", "content": content}]
        return str(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
