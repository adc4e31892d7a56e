"""A row of a cache before the engine has seen it, and as it is read: one response to one prompt, or a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dpkd.teacher_cache.engines.engine import Distributions

if TYPE_CHECKING:
    from dpkd.core.prompts.templates import EncodedPrompt

Origin = Literal["teacher", "reference", "student"]


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """A row before the engine has seen it; `index` is its position among the rows of its part.

    `response_ids` are all tokens after the prompt, those between its `spans` included; `spans` are (start, length),
    counted from the first token of the prompt: empty for a whole response, None in a cache without spans.
    `teacher_prompt_ids` are what the teacher is asked with; None where that is `prompt_ids` in every row of the cache.
    `failed` is the reason why an earlier stage could not make the row: it becomes a failed row without an engine.
    `sampling_logprobs` and `cached_sampling_logprob` are of rows of a round; see `CachedRow`. `question` is what the
    teacher is asked with, as text too. `drops_thinking`: what the response has of it becomes part of the teacher's
    prompt.
    """

    index: int
    example_id: str
    sample: int
    origin: Origin
    prompt: str
    prompt_ids: Sequence[int]
    seed: int = 0
    response_ids: Sequence[int] | None = None
    finish_reason: Literal["stop", "length"] = "stop"
    failed: str | None = None
    sampling_logprobs: Sequence[float] | None = None
    cached_sampling_logprob: float | None = None
    spans: Sequence[Sequence[int]] | None = None
    teacher_prompt_ids: Sequence[int] | None = None
    question: EncodedPrompt | None = None
    drops_thinking: bool = False

    @property
    def asked_ids(self) -> Sequence[int]:
        """The prompt that the teacher gets."""
        return self.prompt_ids if self.teacher_prompt_ids is None else self.teacher_prompt_ids

    def in_spans(self, num_tokens: int) -> np.ndarray:
        """Which of the `num_tokens` tokens after the prompt are learnt from."""
        mask = np.full(num_tokens, not self.spans)
        for start, length in self.spans or ():
            begin = start - len(self.prompt_ids)
            mask[begin : begin + length] = True
        return mask

    def as_failed(self, reason: str) -> dict[str, Any]:
        """This row in the list of failed rows."""
        return {"example_id": self.example_id, "sample": self.sample, "origin": self.origin, "reason": reason}


@dataclass(frozen=True, slots=True)
class CachedRow:
    """A row read from a cache: T response tokens including the EOS, log-probs in nats, float32.

    `distributions` is None in a cache with top-K 0. Rows of a round since format 2, and live samples, also have
    `sampling_logprobs`: log q0 of each token, where q0 is the distribution that it was drawn from (the student of the
    round at temperature 1, or its mixture with the teacher). `cached_sampling_logprob` is log q0 of the whole response
    of the cache's row with the same key, if the round was built with it.

    A row of a conversation may have several `spans`, (start, length) in the sequence of all its tokens, N of them as
    [N, 2]. The T response tokens are those of all spans, and `between_ids` the tokens between them. `spans` is None for
    one span that follows the prompt. `teacher_prompt_ids` is the prompt under which the teacher answered or scored;
    None for the row's own.
    """

    example_id: str
    sample: int
    origin: str
    finish_reason: str
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    response_logprobs: np.ndarray
    distributions: Distributions | None
    sampling_logprobs: np.ndarray | None = None
    cached_sampling_logprob: float | None = None
    spans: np.ndarray | None = None
    between_ids: np.ndarray | None = None
    teacher_prompt_ids: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """Length of the whole sequence, as the student reads it."""
        between = 0 if self.between_ids is None else len(self.between_ids)
        return len(self.prompt_ids) + len(self.response_ids) + between

    @property
    def asked_ids(self) -> np.ndarray:
        """The prompt that the teacher got."""
        return self.prompt_ids if self.teacher_prompt_ids is None else self.teacher_prompt_ids

    def places(self) -> np.ndarray:
        """Index of each response token in the whole sequence, [T]."""
        if self.spans is None:
            return len(self.prompt_ids) + np.arange(len(self.response_ids))
        return np.concatenate([start + np.arange(length) for start, length in self.spans])

    def sequence_ids(self) -> np.ndarray:
        """The whole sequence: the prompt, and the spans with what is between them."""
        if self.spans is None or self.between_ids is None:
            return np.concatenate([self.prompt_ids, self.response_ids])
        ids, in_span = np.zeros(self.num_tokens, np.int32), np.zeros(self.num_tokens, bool)
        in_span[self.places()] = True
        ids[in_span] = self.response_ids
        ids[~in_span] = np.concatenate([self.prompt_ids, self.between_ids])
        return ids

    def by_span(self) -> list[CachedRow]:
        """A row for each span, whose prompt is everything before it; `sample` counts them."""
        if self.spans is None or len(self.spans) == 1:
            return [self]
        sequence, asked, rows, begin = self.sequence_ids(), self.asked_ids, [], 0
        for number, (start, length) in enumerate(self.spans):
            part = slice(begin, begin + length)
            before = sequence[len(self.prompt_ids) : start]
            rows.append(
                replace(
                    self,
                    sample=number,
                    finish_reason="stop" if number < len(self.spans) - 1 else self.finish_reason,
                    prompt_ids=sequence[:start],
                    response_ids=self.response_ids[part],
                    response_logprobs=self.response_logprobs[part],
                    distributions=None if self.distributions is None else self.distributions.positions(part),
                    sampling_logprobs=None if self.sampling_logprobs is None else self.sampling_logprobs[part],
                    spans=None,
                    between_ids=None,
                    teacher_prompt_ids=np.concatenate([asked, before]),
                )
            )
            begin += length
        return rows


def unscored_row(
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    example_id: str = "",
    sample: int = 0,
    spans: Sequence[Sequence[int]] = (),
) -> CachedRow:
    """A reference response without a teacher's log-probs; with several `spans`, `response_ids` are all that follows."""
    plan = PlannedRow(0, example_id, sample, "reference", "", prompt_ids, spans=spans)
    following = np.asarray(response_ids, np.int32)
    mask = plan.in_spans(len(following))
    several = len(spans) > 1
    return CachedRow(
        example_id=example_id,
        sample=sample,
        origin="reference",
        finish_reason="stop",
        prompt_ids=np.asarray(prompt_ids, np.int32),
        response_ids=following[mask],
        response_logprobs=np.zeros(0, np.float32),
        distributions=None,
        spans=np.asarray(spans, np.int32) if several else None,
        between_ids=following[~mask] if several else None,
    )
