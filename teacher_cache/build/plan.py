"""Which rows a cache will hold, in which order: a pure function of data, tokenizer, template and options."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from dpkd.core.errors import UserError
from dpkd.core.prompts.examples import Example, ExampleSource, SkippedRow, iter_examples
from dpkd.core.prompts.templates import EncodedPrompt, PromptEncoder, TemplateMismatchError
from dpkd.teacher_cache.options.cache import CacheConfig
from dpkd.teacher_cache.store.schema import Origin, PlannedRow

NO_REFERENCE = "no reference response"


def request_seed(seed: int, example_id: str, sample: int) -> int:
    """Seed of one request (31 bits): what is drawn for a row does not depend on its neighbours."""
    digest = hashlib.sha256(f"{seed}\0{example_id}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@dataclass(frozen=True)
class Survey:
    """How many rows each origin will have, and what is left out."""

    num_rows: dict[Origin, int]
    skipped: list[SkippedRow]


class RowPlan:
    """The rows of a cache, made anew at every pass so that memory does not grow with the data."""

    def __init__(self, source: ExampleSource, encoder: PromptEncoder, config: CacheConfig) -> None:
        self._source, self._encoder, self._config = source, encoder, config
        self.origins: tuple[Origin, ...] = (
            ("teacher", "reference") if config.responses == "both" else (config.responses,)
        )

    def survey(self) -> Survey:
        """Count rows and list those left out; raises `UserError` when nothing is left."""
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
                f"no row of the data can be used, {len(skipped)} are left out{first}", where=self._source.name
            )
        return Survey(num_rows, skipped)

    def rows(self, origin: Origin) -> Iterator[PlannedRow]:
        """The rows of `origin` in data order."""
        index = 0
        for item in self._encoded():
            if isinstance(item, SkippedRow):
                continue
            example, prompt = item
            made = self._teacher_rows(example, prompt) if origin == "teacher" else self._reference_rows(example, prompt)
            for sample, fields in enumerate(made):
                yield PlannedRow(index, example.example_id, sample, origin, prompt.text, prompt.ids, **fields)  # type: ignore[arg-type]
                index += 1

    def _teacher_rows(self, example: Example, prompt: EncodedPrompt) -> Iterator[dict[str, object]]:
        for sample in range(self._config.num_samples):
            yield {"seed": request_seed(self._config.seed, example.example_id, sample)}

    def _reference_rows(self, example: Example, prompt: EncodedPrompt) -> Iterator[dict[str, object]]:
        for reference in example.references:
            ids = self._encoder.response_ids(prompt, reference)
            cut = len(ids) > self._config.max_new_tokens
            yield {
                "response_ids": ids[: self._config.max_new_tokens],
                "finish_reason": "length" if cut else "stop",
            }

    def _encoded(self) -> Iterator[tuple[Example, EncodedPrompt] | SkippedRow]:
        return encode_examples(self._source, self._encoder, self._config.max_prompt_tokens, self._config.limit)


def encode_examples(
    source: ExampleSource, encoder: PromptEncoder, max_prompt_tokens: int, limit: int | None = None
) -> Iterator[tuple[Example, EncodedPrompt] | SkippedRow]:
    """Examples with their prompts, in file order; rows without a usable prompt come out as `SkippedRow`."""
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
