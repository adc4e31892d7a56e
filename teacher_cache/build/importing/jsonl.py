"""Rows of JSON lines: a prompt, a response and its log-probs as OpenAI's responses have them (docs/importing.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource
from dpkd.core.prompts.examples import Example, SkippedRow
from dpkd.core.prompts.sources import iter_examples, open_examples, raw_rows
from dpkd.core.prompts.templates import PromptEncoder, TemplateMismatchError
from dpkd.teacher_cache.build.importing.source import ImportedRow, SourceFacts
from dpkd.teacher_cache.engines.engine import EngineOptions, Sampling
from dpkd.teacher_cache.engines.openai.messages import Answer, num_entries
from dpkd.teacher_cache.engines.openai.reading import AnswerReader, UnusableAnswerError, end_of
from dpkd.teacher_cache.engines.openai.tokens import TokenTable
from dpkd.teacher_cache.options.derive import ImportConfig

_FLAT = ("tokens", "token_logprobs", "top_logprobs")
_MALFORMED = (ValueError, KeyError, TypeError, IndexError, AttributeError)


class JsonlSource:
    """A file of JSON lines. Raises `UserError` for a file that is not, and where a row has no response."""

    def __init__(self, config: ImportConfig, model: ModelSource) -> None:
        if config.compression is not None:
            raise UserError("--compression goes with --from distillkit", found="--from jsonl")
        self._config, self._model = config, model
        self._source = open_examples(str(config.source))
        self._encoder = PromptEncoder(model.tokenizer, config.template)
        self._top_k, self._scored = 0, False

    def check_unchanged(self) -> None:
        self._source.check_unchanged(content=True)

    def facts(self) -> SourceFacts:
        total, ends = 0, True
        stops = self._model.stop_token_ids()
        table = None
        for _, answer in self._answers():
            total += 1
            if isinstance(answer, str) or answer.tokens is None:
                continue
            self._scored = True
            table = table or TokenTable(self._model.tokenizer)
            self._check_exact(table, answer)
            self._top_k = max(self._top_k, num_entries(answer))
            last = table.find(answer.tokens[-1].text, answer.tokens[-1].data) if answer.tokens else None
            ends &= end_of(answer) != "stop" or last in stops
        lengths = [(len(row.prompt_ids), len(row.result.response_ids)) for row in self.rows() if row.result is not None]
        unknown = () if self._scored and ends else ("end",)
        return SourceFacts(
            num_rows=total,
            top_k=self._top_k,
            longest_prompt=max((prompt for prompt, _ in lengths), default=0),
            longest_response=max((response for _, response in lengths), default=0),
            unknown=unknown if self._scored else ("responses",),
            template=self._encoder.identity(),
            data=self._source.identity,
        )

    def _check_exact(self, table: TokenTable, answer: Answer) -> None:
        written = all(token.text.startswith("token_id:") for token in answer.tokens or ())
        if not (table.is_exact or written):
            raise UserError(
                "several tokens of the tokenizer have the same text, so texts do not say which they are",
                found="tokens as texts",
                expected="tokens as token_id:N",
                where=self._config.source,
                advice="Ask the endpoint for token ids, or remove the log-probs to import texts alone",
            )

    def rows(self) -> Iterator[ImportedRow]:
        reader = AnswerReader(
            tokenizer=self._model.tokenizer,
            vocab_size=self._model.vocab_size,
            options=EngineOptions(max_length=0, top_k=self._top_k, dtype="unknown"),
            sampling=Sampling(1.0, 1.0, 0, tuple(self._model.stop_token_ids())),
            table=TokenTable(self._model.tokenizer) if self._scored else None,
            limits_are_known=False,
        )
        for example, answer in self._answers():
            if isinstance(answer, str):
                yield ImportedRow(_id(example), "", [], None, answer)
                continue
            try:
                assert isinstance(example, Example)
                prompt = self._encoder.prompt(example)
            except TemplateMismatchError as error:
                yield ImportedRow(_id(example), "", [], None, str(error))
                continue
            try:
                result = reader.result(0, answer)
            except UnusableAnswerError as error:
                yield ImportedRow(_id(example), prompt.text, prompt.ids, None, str(error))
            else:
                yield ImportedRow(_id(example), prompt.text, prompt.ids, result)

    def _answers(self) -> Iterator[tuple[Example | SkippedRow, Answer | str]]:
        """Each row's prompt and answer, or why it cannot be used."""
        rows = zip(iter_examples(self._source), raw_rows(self._source), strict=True)
        for example, (line, row) in islice(rows, self._config.limit):
            if isinstance(example, SkippedRow):
                yield example, example.reason
                continue
            if not isinstance(row.get("response"), str):
                raise UserError(
                    f"line {line} has no `response`", found=f"keys {', '.join(map(str, row))}", where=self._source.name
                )
            try:
                yield example, _answer(row)
            except _MALFORMED as error:
                yield example, f"the log-probs are malformed: {type(error).__name__}: {error}"


def _answer(row: dict[str, Any]) -> Answer:
    """The row's response as the endpoint would have sent it."""
    logprobs = row.get("logprobs")
    if logprobs is None and row.get("tokens") is not None:
        logprobs = {key: row.get(key) for key in _FLAT}
    chat = isinstance(logprobs, dict) and "content" in logprobs
    choice: dict[str, Any] = {"logprobs": logprobs, "finish_reason": row.get("finish_reason", "stop")}
    choice |= {"message": {"content": row["response"]}} if chat else {"text": row["response"]}
    answer = Answer.of({"choices": [choice]})
    if answer.tokens is not None and not answer.tops:  # own log-probs alone: no entries
        return replace(answer, tops=[[] for _ in answer.tokens])
    return answer


def _id(example: Example | SkippedRow) -> str:
    return example.example_id if isinstance(example, Example) else f"line-{example.line:08d}"
