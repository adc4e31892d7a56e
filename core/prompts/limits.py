"""Rows of data beyond the limits in tokens are skipped, with the reason; rows whose text is changed are counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dpkd.core.progress import Progress, say
from dpkd.core.prompts.control_tokens import TemplateMismatchError
from dpkd.core.prompts.conversations import EncodedResponse, Turns, references
from dpkd.core.prompts.examples import Example, SkippedRow
from dpkd.core.prompts.sources import ExampleSource, iter_examples
from dpkd.core.prompts.templates import EncodedPrompt, PromptEncoder

#: why a row is skipped where its reference would be cached or learnt from
NO_REFERENCE = "no reference response"


@dataclass
class TextCounts:
    """Rows of data whose text is not taken as it is: they spell a control token, or close a reference with EOS."""

    control_tokens_as_text: int = 0
    closing_eos_removed: int = 0

    def add(self, encoder: PromptEncoder, example: Example, *, references: bool) -> None:
        """Count one row; `references`: whether its references are used, not its prompt alone."""
        used = example.references if references else ()
        kept = [encoder.without_closing_eos(text) for text in used]
        self.closing_eos_removed += kept != list(used)
        texts = [example.instruction or "", example.input, example.prompt or "", example.teacher_prompt or "", *kept]
        for turn in (*(example.messages or ()), *(example.teacher_messages or ())):
            texts += turn.texts()
        for answer in example.turns[-1:] if references else ():
            texts += answer.texts()[1:]  # its content is a reference
        self.control_tokens_as_text += encoder.control.spelled_in([*texts, *example.tools]) is not None

    def to_dict(self) -> dict[str, int]:
        """The counts by name, without those that are 0."""
        return {name: count for name, count in vars(self).items() if count}

    def say(self, name: str = "the data") -> None:
        """Print what was found in the data `name`, if anything."""
        if self.control_tokens_as_text:
            say(f"{name}: {self.control_tokens_as_text} rows spell control tokens, which are encoded as text")
        if self.closing_eos_removed:
            say(f"{name}: {self.closing_eos_removed} rows end references with the text of EOS, which is removed")


def given_responses(
    example: Example,
    encoder: PromptEncoder,
    turns: Turns,
    max_prompt_tokens: int,
    max_new_tokens: int,
    prompt: EncodedPrompt | None = None,
) -> list[EncodedResponse | SkippedRow]:
    """The given responses of an example within the limits (tokens), and what of it is skipped. `prompt`: its own."""
    try:
        whole = references(encoder, example, turns, prompt)
    except TemplateMismatchError as error:
        return [SkippedRow(example.line, str(error))]
    found: list[EncodedResponse | SkippedRow] = []
    for response in whole:
        reason = too_long(response.prompt, max_prompt_tokens)
        if reason is not None:
            return [SkippedRow(example.line, reason)]
        kept = fitted(response, max_prompt_tokens, max_new_tokens)
        found.append(kept)
        if lost := len(response.spans) - len(kept.spans):
            reason = f"the last {lost} of {len(response.spans)} turns do not fit: too long a history, or a cut turn"
            found.append(SkippedRow(example.line, reason))
    return found


def too_long(prompt: EncodedPrompt, most: int, what: str = "prompt") -> str | None:
    """Why `prompt` cannot be used, if it has more than `most` tokens."""
    return f"{what} has {len(prompt.ids)} tokens, more than {most}" if len(prompt.ids) > most else None


def encode_examples(
    source: ExampleSource, encoder: PromptEncoder, max_prompt_tokens: int, limit: int | None = None
) -> Iterator[tuple[Example, EncodedPrompt] | SkippedRow]:
    """Examples with their prompts, in file order; a row without a usable prompt becomes a `SkippedRow`."""
    for item in encoder.in_batches(iter_examples(source, limit), references=False):
        if isinstance(item, SkippedRow):
            yield item
            continue
        try:
            prompt = encoder.prompt(item)
        except TemplateMismatchError as error:
            yield SkippedRow(item.line, str(error))
            continue
        reason = too_long(prompt, max_prompt_tokens)
        yield (item, prompt) if reason is None else SkippedRow(item.line, reason)


def with_progress(items: Iterable[Example | SkippedRow]) -> Iterator[Example | SkippedRow]:
    """`items`, counted on standard error while they are read."""
    with Progress("reading the data", None, "rows") as progress:
        for item in items:
            yield item
            progress.advance()


def fitted(response: EncodedResponse, max_prompt_tokens: int, max_new_tokens: int) -> EncodedResponse:
    """`response` up to the first turn that is too long, which is cut, or has too long a history, which is left out."""
    begin = len(response.prompt.ids)
    spans: list[tuple[int, int]] = []
    for start, length in response.spans:
        if spans and start > max_prompt_tokens:
            break
        spans.append((start, min(length, max_new_tokens)))
        if length > max_new_tokens:
            break
    end = sum(spans[-1])
    is_cut = spans[-1][1] < response.spans[len(spans) - 1][1]
    return EncodedResponse(response.prompt, response.ids[: end - begin], tuple(spans), is_cut)
