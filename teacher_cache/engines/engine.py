"""The interface of an engine and its types: token ids in, token ids and natural-log probabilities out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from dpkd.core.errors import UserError

if TYPE_CHECKING:
    import numpy as np

LocalEngineName = Literal["auto", "vllm", "transformers"]
EngineName = Literal["auto", "vllm", "transformers", "server", "ray", "openai"]
ResolvedEngine = Literal["vllm", "transformers", "server", "ray", "openai"]
EndpointApi = Literal["completions", "chat"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are drawn. Temperature 0 is greedy. The seed comes with each request."""

    temperature: float
    top_p: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine is started with.

    Args:
        max_length: longest prompt plus response, in tokens.
        top_k: entries of the distribution to return at each position.
        dtype: number type of the weights.
        device: auto, cpu or cuda.
        max_num_seqs: requests that run at the same time.
        top_mass: keep only the smallest set of the `top_k` entries that reaches this probability. None: keep all.
        engine_args: vLLM's own arguments, as text.
        server_urls: addresses of the servers of the engine `server`.
    """

    max_length: int
    top_k: int
    dtype: str
    device: str = "auto"
    max_num_seqs: int = 64
    top_mass: float | None = None
    engine_args: Mapping[str, str] = field(default_factory=dict)
    server_urls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Draw one response to `prompt_ids`; `index` comes back with the result.

    `text` and `messages` (with `tools`) are the same prompt for an endpoint that takes no ids.
    """

    index: int
    prompt_ids: Sequence[int]
    seed: int
    text: str = ""
    messages: Sequence[Mapping[str, Any]] | None = None
    tools: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Score `response_ids` after `prompt_ids`; `index` comes back with the result."""

    index: int
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Distributions:
    """The top of the distribution at each of T response positions, E entries in all.

    `counts_T` is the number of entries at each position. Their ids and log-probs (nats, full vocabulary,
    temperature 1) are in `ids_E` and `logprobs_E`, one position after the other, in rank order. `log_tail_T` is the log
    of the tail mass, the probability of all other tokens (-inf when there are none).
    """

    counts_T: np.ndarray
    ids_E: np.ndarray
    logprobs_E: np.ndarray
    log_tail_T: np.ndarray

    def positions(self, wanted: np.ndarray | slice) -> Distributions:
        """The distributions at some of the positions."""
        import numpy as np

        mask_T = np.zeros(len(self.counts_T), bool)
        mask_T[wanted] = True
        mask_E = np.repeat(mask_T, self.counts_T)
        counts_T, log_tail_T = self.counts_T[mask_T], self.log_tail_T[mask_T]
        return Distributions(counts_T, self.ids_E[mask_E], self.logprobs_E[mask_E], log_tail_T)


@dataclass(frozen=True, slots=True)
class EngineResult:
    """One response: its ids with the EOS, the log-prob of each (nats, float32), and the top of the distributions.

    `distributions` is None with `top_k` 0.
    """

    index: int
    response_ids: np.ndarray
    finish_reason: FinishReason
    logprobs_T: np.ndarray
    distributions: Distributions | None


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """A request that the engine cannot answer, even when tried alone; `reason` is one line for the user."""

    index: int
    reason: str


class Engine(Protocol):
    """A running model. Results come in the order in which they finish; requests are read as the engine has capacity.

    A request that makes the engine fail is tried again alone. If it fails again, it becomes a `FailedRequest` and the
    others continue. An engine that cannot continue at all raises `UserError`.

    Log-probabilities are those of the full vocabulary at temperature 1, whatever the sampling temperature.
    """

    name: str
    vocab_size: int

    def generate(
        self, requests: Iterable[GenerateRequest], sampling: Sampling
    ) -> Iterator[EngineResult | FailedRequest]:
        """Draw a response for every request."""
        ...

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[EngineResult | FailedRequest]:
        """Log-probabilities of given responses. Their `finish_reason` is always `stop`."""
        ...

    def forget(self, indices: Iterable[int]) -> None:
        """The rows of these requests are committed: an engine that has kept their answers may drop them."""
        return

    def close(self) -> None:
        """Free the model's memory."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def results_only(answers: Iterable[EngineResult | FailedRequest]) -> Iterator[EngineResult]:
    """The results; raises `UserError` for a failed request."""
    for answer in answers:
        if isinstance(answer, FailedRequest):
            raise UserError(f"the engine cannot answer request {answer.index}: {answer.reason}")
        yield answer
