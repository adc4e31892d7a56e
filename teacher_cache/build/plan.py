"""The rows of a cache and their order: a pure function of data, tokenizer, template and options."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from dpkd.core.errors import UserError
from dpkd.core.identity import derive_seed
from dpkd.core.prompts.examples import Example, ExampleSource, SkippedRow, iter_examples
from dpkd.core.prompts.templates import EncodedPrompt, PromptEncoder, TemplateMismatchError
from dpkd.teacher_cache.engines.engine import FinishReason
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.schema import Origin, PlannedRow

NO_REFERENCE = "no reference response"


def request_seed(seed: int, example_id: str, sample: int) -> int:
    """Seed of one request (31 bits), so that a response does not depend on the other rows."""
    return derive_seed(seed, example_id, sample, bits=31)


@dataclass(frozen=True)
class Survey:
    """How many rows each origin will have, and the skipped rows of the data."""

    num_rows: dict[Origin, int]
    skipped: list[SkippedRow]


class RowPlan:
    """The rows of a cache. They are made again at every pass, so that memory does not grow with the data."""

    def __init__(self, source: ExampleSource, encoder: PromptEncoder, config: CacheConfig) -> None:
        self._source, self._encoder, self._config = source, encoder, config
        self.origins: tuple[Origin, ...] = (
            ("teacher", "reference") if config.responses == "both" else (config.responses,)
        )

    def survey(self) -> Survey:
        """Count the rows and list the skipped ones; raises `UserError` if no row can be used."""
        num_rows: dict[Origin, int] = dict.fromkeys(self.origins, 0)
        skipped: list[SkippedRow] = []
        for item in self._encoded():
            if isinstance(item, SkippedRow):
                skipped.append(item)
                continue
            example, _ = item
            for origin in self.origins:
                num_rows[origin] += self._config.num_samples if origin == "teacher" else len(example.references)
            if "reference" in self.origins and not example.references:
                skipped.append(SkippedRow(example.line, NO_REFERENCE))
        if not sum(num_rows.values()):
            first = f"; line {skipped[0].line}: {skipped[0].reason}" if skipped else ""
            raise UserError(
                f"no row of the data can be used, {len(skipped)} are skipped{first}", where=self._source.name
            )
        return Survey(num_rows, skipped)

    def rows(self, origin: Origin) -> Iterator[PlannedRow]:
        """The rows of `origin` in data order."""
        index = itertools.count()
        limit = self._config.max_new_tokens
        for item in self._encoded():
            if isinstance(item, SkippedRow):
                continue
            example, prompt = item
            planned = partial(
                PlannedRow, example_id=example.example_id, origin=origin, prompt=prompt.text, prompt_ids=prompt.ids
            )
            if origin == "teacher":
                for sample in range(self._config.num_samples):
                    seed = request_seed(self._config.seed, example.example_id, sample)
                    yield planned(next(index), sample=sample, seed=seed)
                continue
            for sample, reference in enumerate(example.references):
                ids = self._encoder.response_ids(prompt, reference)
                ended: FinishReason = "length" if len(ids) > limit else "stop"
                yield planned(next(index), sample=sample, response_ids=ids[:limit], finish_reason=ended)

    def _encoded(self) -> Iterator[tuple[Example, EncodedPrompt] | SkippedRow]:
        return encode_examples(self._source, self._encoder, self._config.max_prompt_tokens, self._config.limit)


def encode_examples(
    source: ExampleSource, encoder: PromptEncoder, max_prompt_tokens: int, limit: int | None = None
) -> Iterator[tuple[Example, EncodedPrompt] | SkippedRow]:
    """Examples with their prompts, in file order; a row without a usable prompt becomes a `SkippedRow`."""
    for item in iter_examples(source, limit):
        if isinstance(item, SkippedRow):
            yield item
            continue
        try:
            prompt = encoder.prompt(item)
        except TemplateMismatchError as error:
            yield SkippedRow(item.line, str(error))
            continue
        if len(prompt.ids) > max_prompt_tokens:
            yield SkippedRow(item.line, f"prompt has {len(prompt.ids)} tokens, more than {max_prompt_tokens}")
        else:
            yield item, prompt
