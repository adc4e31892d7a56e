"""The seam to whatever runs a model: two methods, token ids in, token ids and natural-log probabilities out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, Self

from dpkd.teacher_cache.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from dpkd.teacher_cache.models import ModelSource

EngineName = Literal["auto", "vllm", "transformers"]
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
    """What an engine must be able to hold: `max_length` is prompt plus response, in tokens."""

    max_length: int
    top_k: int
    dtype: str
    device: str = "auto"
    max_num_seqs: int = 64


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
    full vocabulary, temperature 1). `log_remainder_T` is the log of the mass outside the entries (-inf when nothing
    is outside).
    """

    counts_T: np.ndarray
    ids_E: np.ndarray
    logprobs_E: np.ndarray
    log_remainder_T: np.ndarray


@dataclass(frozen=True, slots=True)
class EngineResult:
    """One response as the model sees it: ids with their EOS, and the log p of each (nats, float32)."""

    index: int
    response_ids: np.ndarray
    finish_reason: FinishReason
    logprobs_T: np.ndarray
    distributions: Distributions | None


class Engine(Protocol):
    """A running model. Results arrive in whatever order they finish; requests are pulled as places fall free.

    Log-probabilities are those of the full vocabulary at temperature 1, whatever the sampling temperature.
    """

    name: str
    vocab_size: int

    def generate(self, requests: Iterable[GenerateRequest], sampling: Sampling) -> Iterator[EngineResult]:
        """Draw a response for every request."""
        ...

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[EngineResult]:
        """Log-probabilities of given responses; `finish_reason` is `stop`, the caller knows better."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


def resolve_engine(name: EngineName) -> Literal["vllm", "transformers"]:
    """`auto` is vLLM where it is installed, else transformers. Raises `UserError` for a named engine not installed."""
    from importlib.util import find_spec

    has_vllm = find_spec("vllm") is not None
    if name == "vllm" and not has_vllm:
        raise UserError(
            "the engine vllm is not installed",
            advice="Install dpkd[teacher-cpu] or dpkd[teacher-gpu], or choose --engine transformers",
        )
    if name == "auto":
        return "vllm" if has_vllm else "transformers"
    return name


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


def open_engine(name: Literal["vllm", "transformers"], model: ModelSource, options: EngineOptions) -> Engine:
    """Start the engine; raises `UserError` when the model cannot hold `options`."""
    check_fits(model, options)
    if name == "vllm":
        from dpkd.teacher_cache.vllm_engine import VllmEngine

        return VllmEngine(model, options)
    from dpkd.teacher_cache.transformers_engine import TransformersEngine

    return TransformersEngine(model, options)
