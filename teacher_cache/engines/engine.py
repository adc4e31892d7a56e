"""The seam to whatever runs a model: two methods, token ids in, token ids and natural-log probabilities out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, Self

from dpkd.core.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from dpkd.core.models import ModelSource

LocalEngineName = Literal["auto", "vllm", "transformers"]
EngineName = Literal["auto", "vllm", "transformers", "server", "ray"]
ResolvedEngine = Literal["vllm", "transformers", "server", "ray"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are drawn. `temperature` 0 is greedy; every request carries its own seed."""

    temperature: float
    top_p: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine must be able to hold: `max_length` is prompt plus response, in tokens.

    `top_k` entries of a distribution are asked for; with `top_mass` only the smallest set of them that reaches that
    probability is kept. `engine_args` are vLLM's own arguments as text; `server_urls` are the servers of the engine
    `server`.
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
    """Draw one response to `prompt_ids`; `index` comes back with the result."""

    index: int
    prompt_ids: Sequence[int]
    seed: int


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Score `response_ids` after `prompt_ids`; `index` comes back with the result."""

    index: int
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Distributions:
    """The top of the distribution at each of T response positions, E entries in all.

    `counts_T` entries belong to each position, in rank order, concatenated in `ids_E` and `logprobs_E` (nats,
    full vocabulary, temperature 1). `log_tail_T` is the log of the mass outside the entries (-inf when nothing
    is outside).
    """

    counts_T: np.ndarray
    ids_E: np.ndarray
    logprobs_E: np.ndarray
    log_tail_T: np.ndarray


@dataclass(frozen=True, slots=True)
class EngineResult:
    """One response as the model sees it: ids with their EOS, and the log p of each (nats, float32)."""

    index: int
    response_ids: np.ndarray
    finish_reason: FinishReason
    logprobs_T: np.ndarray
    distributions: Distributions | None


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """A request that the engine cannot answer, whatever it tried; `reason` is one line for a person."""

    index: int
    reason: str


class Engine(Protocol):
    """A running model. Results arrive in whatever order they finish; requests are pulled as places fall free.

    A request that makes the engine fail is tried again, alone, and comes out as a `FailedRequest` when that does not
    help; the others go on. An engine that cannot go on at all raises `UserError`.

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
        """Log-probabilities of given responses; `finish_reason` is `stop`, the caller knows better."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


_INSTALL = {
    "vllm": "Install dpkd[teacher-cpu] or dpkd[teacher-gpu], or choose --engine transformers",
    "ray": "Install dpkd[ray], or choose another --engine",
}


def resolve_engine(name: EngineName) -> ResolvedEngine:
    """`auto` is vLLM where it is installed, else transformers. Raises `UserError` for a named engine not installed."""
    from importlib.util import find_spec

    if name == "auto":
        return "transformers" if find_spec("vllm") is None else "vllm"
    if name in _INSTALL and find_spec(name) is None:
        raise UserError(f"the engine {name} is not installed", advice=_INSTALL[name])
    return name


def results_only(answers: Iterable[EngineResult | FailedRequest]) -> Iterator[EngineResult]:
    """The results, for a caller that cannot go on without one: a failed request is raised as `UserError`."""
    for answer in answers:
        if isinstance(answer, FailedRequest):
            raise UserError(f"the engine cannot answer request {answer.index}: {answer.reason}")
        yield answer


def check_engine(name: ResolvedEngine, model: ModelSource, options: EngineOptions, *, scores: bool) -> None:
    """Raise `UserError` for options that `model` or the engine cannot take; starts nothing."""
    check_fits(model, options)
    if name in ("vllm", "ray"):
        from dpkd.teacher_cache.engines.vllm.engine_args import check_engine_args

        check_engine_args(options.engine_args, scores=scores)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an engine failed for want of memory, its own device's or the machine's."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(phrase in text for phrase in ("out of memory", "can't allocate memory", "cannot allocate memory"))
    )


def check_fits(model: ModelSource, options: EngineOptions) -> None:
    """Raise `UserError` when the model cannot hold `options`; cheap, so that it can come before any engine starts."""
    if options.top_k > model.vocab_size:
        raise UserError(
            "top-k is above the vocabulary",
            found=options.top_k,
            expected=f"at most {model.vocab_size}",
            where=model.name,
            advice="Lower --top-k",
        )
    if model.max_positions is not None and options.max_length > model.max_positions:
        raise UserError(
            "prompt and response do not fit the model's positions",
            found=f"{options.max_length} tokens",
            expected=f"at most {model.max_positions}",
            where=model.name,
            advice="Lower --max-prompt-tokens or --max-new-tokens",
        )


def open_engine(name: ResolvedEngine, model: ModelSource, options: EngineOptions) -> Engine:
    """Start the engine in this process (or connect to its servers); raises `UserError` when the model cannot hold
    `options`. The engine `ray` has no single process: `ray_engine` runs it.
    """
    check_fits(model, options)
    if name == "vllm":
        from dpkd.teacher_cache.engines.vllm.engine import VllmEngine

        return VllmEngine(model, options)
    if name == "server":
        from dpkd.teacher_cache.engines.server.engine import ServerEngine

        return ServerEngine(model, options)
    if name == "transformers":
        from dpkd.teacher_cache.engines.transformers_engine import TransformersEngine

        return TransformersEngine(model, options)
    raise ValueError(f"the engine {name} does not run in one process")
