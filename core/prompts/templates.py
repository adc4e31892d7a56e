"""Prompt templates and the one way from an example to token ids, shared by caching, training and evaluation."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from dpkd.core.errors import UserError, first_line
from dpkd.core.identity import canonical_json
from dpkd.core.prompts.control_tokens import ControlTokens, TemplateMismatchError
from dpkd.core.prompts.examples import Example, SkippedRow
from dpkd.core.prompts.messages import Message

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


_ENCODED_TOGETHER = 512  # rows


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as text, as the token ids that every stage uses, and as marked text (`control_tokens`).

    With a chat template also as `turns`, under the `tools` of the row.
    """

    text: str
    ids: list[int]
    marked: str = ""
    turns: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()


class PromptEncoder:
    """Turns examples into prompts and answers into response ids with one tokenizer and one template.

    `alpaca` and `raw` texts are encoded with the tokenizer's own special tokens (a BOS where it has one); the `chat`
    template writes them itself. What a row says is encoded as text, control tokens that it spells included (`control`).
    `template_args` are variables of the chat template, as text: `true`, numbers and other JSON become values.

    Raises `UserError` for a tokenizer without EOS, for `chat` without a chat template, and for `template_args` without
    `chat`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: TemplateName,
        template_args: Mapping[str, str] | None = None,
    ) -> None:
        if template == "chat" and not tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template",
                where=tokenizer.name_or_path,
                advice="Choose --template alpaca or raw",
            )
        if template != "chat" and template_args:
            raise UserError(
                "only a chat template has arguments",
                found=f"--template {template} with --template-arg",
                advice="Choose --template chat, or leave --template-arg out",
            )
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token", where=tokenizer.name_or_path)
        self.tokenizer = tokenizer
        self._args = dict(template_args or {})
        self.template_args = {key: _as_value(text) for key, text in self._args.items()}
        self.template = template
        self.eos_token_id = int(tokenizer.eos_token_id)
        self.control = ControlTokens(tokenizer)
        self._encoded: dict[str, list[int]] = {}

    def in_batches(self, items: Iterable[Example | SkippedRow], *, references: bool) -> Iterator[Example | SkippedRow]:
        """The same items. Their prompts, and with `references` their responses, are encoded together in advance.

        This is faster than one by one, and changes no id.
        """
        pending = iter(items)
        while batch := list(itertools.islice(pending, _ENCODED_TOGETHER)):
            self._encoded = {}
            texts = []
            for example in batch:
                if isinstance(example, Example):
                    # a row that has no prompt raises its error where it is used
                    with contextlib.suppress(TemplateMismatchError, UserError):
                        marked = self._prompt_text(example)
                        texts.append(marked)
                        if references:
                            texts += [marked + self.without_closing_eos(text) for text in example.references]
            ids = self.control.encode(texts, add_special_tokens=self.template != "chat")
            self._encoded = dict(zip(texts, ids, strict=True))
            yield from batch
        self._encoded = {}

    def prompt(self, example: Example) -> EncodedPrompt:
        """The prompt of `example`; raises `TemplateMismatchError` for a form that the template cannot hold."""
        turns = chat_turns(example) if self.template == "chat" else ()
        return replace(self.encoded(self._prompt_text(example)), turns=turns, tools=example.tools)

    def encoded(self, marked: str, ids: list[int] | None = None) -> EncodedPrompt:
        """The prompt that `marked` is, with its `ids` if they are known."""
        return EncodedPrompt(self.control.plain(marked), self.encode(marked) if ids is None else ids, marked)

    def response_ids(self, prompt: EncodedPrompt, response: str) -> list[int]:
        """Ids of `response` (text, or marked text) after `prompt`, EOS appended; one EOS spelled at its end is removed.

        The text is encoded together with the prompt (as the paper's family does); where a token would straddle the
        seam it is encoded alone, so that the prompt ids are the same in generation, scoring and training.
        """
        response = self.without_closing_eos(response)
        ids = self.encode(prompt.marked + response)
        if ids[: len(prompt.ids)] == prompt.ids:
            ids = ids[len(prompt.ids) :]
        else:
            [ids] = self.control.encode([response])
        return [*ids, self.eos_token_id]

    def without_closing_eos(self, response: str) -> str:
        """`response` without one EOS spelled at its end, and without the white space after it."""
        text, eos = response.rstrip(), str(self.tokenizer.eos_token)
        return text.removesuffix(eos) if text.endswith(eos) else response

    def decode(self, response_ids: list[int]) -> str:
        """Text of a response, special tokens left out."""
        return str(self.tokenizer.decode(response_ids, skip_special_tokens=True))

    def identity(self) -> dict[str, Any]:
        """Name and sha256 of the template's text. Arguments, if there are any, are in the hash, and under `args`."""
        text = str(self.tokenizer.chat_template) if self.template == "chat" else _ALPACA + "\0" + _ALPACA_WITH_INPUT
        if self.template == "raw":
            text = "{prompt}"
        if self.template_args:
            text += "\0" + canonical_json(self.template_args).decode()
        args = {"args": self._args} if self._args else {}
        return {"name": self.template, "sha256": hashlib.sha256(text.encode()).hexdigest()} | args

    def encode(self, marked: str) -> list[int]:
        """Ids of a marked text that the template has made."""
        if (known := self._encoded.get(marked)) is not None:
            return list(known)
        return self.control.encode([marked], add_special_tokens=self.template != "chat")[0]

    def _prompt_text(self, example: Example) -> str:
        if self.template == "chat":
            return self.render(example, chat_turns(example), open_turn=True)
        if example.tools:
            raise TemplateMismatchError(f"template {self.template} has no place for the row's tools")
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

    def render(self, example: Example, turns: Sequence[Message], *, open_turn: bool) -> str:
        """Marked text: `turns` in the chat template with the tools of `example`; `open_turn`: up to the next answer.

        Raises `UserError` if the template refuses them, or leaves tools or their calls out.
        """
        where = self.tokenizer.name_or_path

        def write(of_row: dict[str, Any]) -> str:
            variables = self.template_args | ({"tools": of_row["tools"]} if example.tools else {})
            return str(
                self.tokenizer.apply_chat_template(
                    of_row["turns"], add_generation_prompt=open_turn, tokenize=False, **variables
                )
            )

        of_row = {"turns": [turn.for_template() for turn in turns], "tools": list(example.tools)}
        try:
            text = self.control.rendered(write, of_row)
        except TemplateMismatchError:
            raise
        except Exception as error:  # whatever a template's code may raise
            raise UserError(
                f"the chat template refuses line {example.line}: {first_line(error)}",
                found="roles " + ", ".join(turn.role for turn in turns),
                where=where,
                advice="Change the turns of the data, give --template-arg, or choose another tokenizer",
            ) from None
        plain = self.control.plain(text)
        functions = [call["function"] for turn in turns for call in turn.tool_calls]
        functions += [tool.get("function", tool) for tool in example.tools]
        if missing := [name for name in (str(function.get("name")) for function in functions) if name not in plain]:
            raise UserError(
                f"the chat template does not write the tools of line {example.line}",
                found=f"no {missing[0]!r} in the prompt",
                where=where,
                advice="Choose a tokenizer whose chat template knows tools, or leave these rows out",
            )
        return text


def chat_turns(example: Example) -> tuple[Message, ...]:
    """The row as chat turns: its own before the one to answer, or one turn of the user."""
    if example.messages is not None:
        return example.messages
    content = example.instruction or example.prompt or ""
    return (Message("user", f"{content}\n\n{example.input}" if example.input else content),)


def _as_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
