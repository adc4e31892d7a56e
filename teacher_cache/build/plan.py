"""The rows of a cache and their order: a pure function of data, tokenizer, template and options."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.identity import derive_seed
from dpkd.core.prompts.control_tokens import TemplateMismatchError
from dpkd.core.prompts.conversations import (
    EncodedResponse,
    answer_places,
    history,
    open_places_before,
    without_thoughts,
)
from dpkd.core.prompts.examples import Example, SkippedRow
from dpkd.core.prompts.limits import NO_REFERENCE, TextCounts, given_responses, too_long, with_progress
from dpkd.core.prompts.sources import ExampleSource, iter_examples
from dpkd.core.prompts.templates import EncodedPrompt, PromptEncoder
from dpkd.core.prompts.thinking import opens_thinking
from dpkd.teacher_cache.build.survey import Part, Survey
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.rows import Origin, PlannedRow

#: text of the teacher's answer to a row (example id, sample); None if it failed
AnswerOf = Callable[[str, int], str | None]


def request_seed(seed: int, example_id: str, sample: int) -> int:
    """Seed of one request (31 bits), so that a response does not depend on the other rows."""
    return derive_seed(seed, example_id, sample, bits=31)


@dataclass(frozen=True)
class _Entry:
    """A row before its tokens are final: a given `response`, or a question to the teacher, who is asked `asked`.

    The prompt of a question is None where it has earlier answers of the teacher; `place` is its place in the turns.
    """

    part: Part
    name: str
    prompt: EncodedPrompt | None
    asked: EncodedPrompt | None
    response: EncodedResponse | None = None
    sample: int = 0
    place: int = 0


class RowPlan:
    """The rows of a cache. They are made again at every pass, so that memory does not grow with the data."""

    def __init__(self, source: ExampleSource, encoder: PromptEncoder, config: CacheConfig) -> None:
        self._source, self._encoder, self._config = source, encoder, config
        self.origins: tuple[Origin, ...] = (
            ("teacher", "reference") if config.responses == "both" else (config.responses,)
        )

    @cached_property
    def survey(self) -> Survey:
        """The rows, counted, and the skipped ones, listed; raises `UserError` if no row can be used."""
        num_rows: dict[Part, int] = {Part(origin): 0 for origin in self.origins}
        skipped: list[SkippedRow] = []
        spans = prompts = turns = tools = False
        drops = self._config.thinking == "drop"
        text, uses_references = TextCounts(), "reference" in self.origins
        for item in with_progress(self._examples(references=False)):
            if isinstance(item, Example):
                text.add(self._encoder, item, references=uses_references)
                tools |= bool(item.tools)
            for entry in (item,) if isinstance(item, SkippedRow) else self._entries(item, counting=True):
                if isinstance(entry, SkippedRow):
                    skipped.append(entry)
                    continue
                copies = self._config.num_samples if entry.part.origin == "teacher" else 1
                num_rows[entry.part] = num_rows.get(entry.part, 0) + copies
                spans |= entry.response is not None and len(entry.response.spans) > 1
                prompts |= _ids(entry.asked) != _ids(entry.prompt) or (drops and entry.part.origin == "teacher")
                turns |= isinstance(item, Example) and entry.name != item.example_id
        if not sum(num_rows.values()):
            first = f"; line {skipped[0].line}: {skipped[0].reason}" if skipped else ""
            raise UserError(
                f"no row of the data can be used, {len(skipped)} are skipped{first}", where=self._source.name
            )
        return Survey(num_rows, skipped, spans, prompts, turns, tools, text)

    def rows(self, part: Part, answer_of: AnswerOf = lambda name, sample: None) -> Iterator[PlannedRow]:
        """The rows of `part` in data order; `answer_of` gives the teacher's answers to earlier turns."""
        index = itertools.count()
        for item in self._examples(references=part.origin == "reference"):
            if isinstance(item, SkippedRow):
                continue
            for entry in self._entries(item, part):
                if isinstance(entry, SkippedRow) or entry.part != part:
                    continue
                if entry.response is not None:
                    yield self._given(next(index), entry, entry.response)
                    continue
                for sample in range(self._config.num_samples):
                    yield self._asked(next(index), item, entry, sample, answer_of)

    def _examples(self, *, references: bool) -> Iterator[Example | SkippedRow]:
        items = iter_examples(self._source, self._config.limit)
        if self._config.thinking == "drop":
            items = (without_thoughts(item) if isinstance(item, Example) else item for item in items)
        return self._encoder.in_batches(items, references=references)

    def _given(self, index: int, entry: _Entry, response: EncodedResponse) -> PlannedRow:
        assert entry.asked is not None
        return PlannedRow(
            index,
            entry.name,
            entry.sample,
            entry.part.origin,
            response.prompt.text,
            response.prompt.ids,
            response_ids=response.ids,
            finish_reason="length" if response.is_cut else "stop",
            **self._columns(entry.asked, response.spans if len(response.spans) > 1 else ()),
        )

    def _asked(self, index: int, example: Example, entry: _Entry, sample: int, answer_of: AnswerOf) -> PlannedRow:
        prompt, asked, failed = entry.prompt, entry.asked, None
        if prompt is None or asked is None:
            prompt, failed = self._after_answers(example, entry.place, sample, answer_of)
            asked = prompt
        return PlannedRow(
            index,
            entry.name,
            sample,
            entry.part.origin,
            prompt.text,
            prompt.ids,
            seed=request_seed(self._config.seed, entry.name, sample),
            failed=failed,
            question=asked,
            drops_thinking=self._config.thinking == "drop",
            **self._columns(asked, ()),
        )

    def _after_answers(
        self, example: Example, place: int, sample: int, answer_of: AnswerOf
    ) -> tuple[EncodedPrompt, str | None]:
        """The prompt of a turn after the teacher's own answers, and why it cannot be asked, if so."""
        places = answer_places(example)
        answers = []
        for other in open_places_before(example, place):
            turn = places.index(other) + 1
            answer = answer_of(f"{example.example_id}/turn-{turn}", sample)
            if answer is None:
                return EncodedPrompt("", []), f"the teacher's answer to turn {turn} is missing"
            answers.append(answer)
        prompt = self._encoder.prompt(history(example, place, answers))
        return prompt, too_long(prompt, self._config.max_prompt_tokens)

    def _columns(self, asked: EncodedPrompt, spans: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """The values of extra columns, where this cache has them."""
        return {
            "spans": spans if self.survey.has_spans else None,
            "teacher_prompt_ids": asked.ids if self.survey.has_teacher_prompts else None,
        }

    def _entries(
        self, example: Example, only: Part | None = None, *, counting: bool = False
    ) -> Iterator[_Entry | SkippedRow]:
        """The rows of an example; with `only`, at least those of that part. `counting`: references need no ids."""
        if self._config.turns == "all" and example.messages is not None and len(answer_places(example)) > 1:
            if example.for_teacher is not None:
                yield SkippedRow(example.line, "`teacher_messages` are for one response: give --turns last")
                return
            for origin in self.origins:
                if only is None or only.origin == origin:
                    yield from self._questions(example, only) if origin == "teacher" else self._responses(example)
            return
        try:
            prompt = self._encoder.prompt(example)
            asked = prompt if example.for_teacher is None else self._encoder.prompt(example.for_teacher)
        except TemplateMismatchError as error:
            yield SkippedRow(example.line, str(error))
            return
        self._check_thinking(example, prompt)
        reason = too_long(prompt, self._config.max_prompt_tokens)
        if reason is None and asked is not prompt:
            reason = too_long(asked, self._config.max_prompt_tokens, "the teacher's prompt")
        if reason is not None:
            yield SkippedRow(example.line, reason)
            return
        for origin in self.origins:
            if only is not None and only.origin != origin:
                continue
            if origin == "teacher":
                yield _Entry(Part("teacher"), example.example_id, prompt, asked)
            elif counting and example.references and not example.turns:
                for sample in range(len(example.references)):
                    yield _Entry(Part("reference"), example.example_id, prompt, asked, sample=sample)
            else:
                yield from self._responses(example, prompt, asked)

    def _check_thinking(self, example: Example, prompt: EncodedPrompt) -> None:
        """Raise `UserError` if thinking is dropped and the prompt begins it."""
        if self._config.thinking == "drop" and opens_thinking(prompt.text):
            raise UserError(
                "the template begins the thinking in the prompt, and a student without it would answer inside",
                found=repr(prompt.text[-24:]),
                where=f"line {example.line} of {self._source.name}",
                advice="Give --thinking keep, or the --template-arg that leaves <think> to the model",
            )

    def _questions(self, example: Example, only: Part | None) -> Iterator[_Entry | SkippedRow]:
        """The turns of a conversation, each asked under what is before it."""
        for number, place in enumerate(answer_places(example), start=1):
            part, prompt = Part("teacher", number), None
            if only not in (None, part):
                continue
            if not open_places_before(example, place):
                try:
                    prompt = self._encoder.prompt(history(example, place, ()))
                except TemplateMismatchError as error:
                    yield SkippedRow(example.line, str(error))
                    return
                self._check_thinking(example, prompt)
                reason = too_long(prompt, self._config.max_prompt_tokens, f"prompt of turn {number}")
                if reason is not None:
                    yield SkippedRow(example.line, reason)
                    continue
            yield _Entry(part, f"{example.example_id}/turn-{number}", prompt, prompt, place=place)

    def _responses(
        self, example: Example, prompt: EncodedPrompt | None = None, asked: EncodedPrompt | None = None
    ) -> Iterator[_Entry | SkippedRow]:
        """The given responses of an example. Of a conversation that is too long, the turns that fit are used."""
        config = self._config
        limits = config.max_prompt_tokens, config.max_new_tokens
        found = given_responses(example, self._encoder, config.turns, *limits, prompt)
        for sample, item in enumerate(found):
            if isinstance(item, SkippedRow):
                yield item
                continue
            yield _Entry(Part("reference"), example.example_id, item.prompt, asked or item.prompt, item, sample)
        if not found:
            yield SkippedRow(example.line, NO_REFERENCE)


def _ids(prompt: EncodedPrompt | None) -> list[int] | None:
    return None if prompt is None else prompt.ids
