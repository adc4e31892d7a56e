"""The vLLM engine: continuous batching, flat log-probs, ids in and ids out (checked against vLLM 0.32)."""

from __future__ import annotations

import contextlib
import gc
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import numpy as np

from dpkd.core.errors import UserError, first_line
from dpkd.core.progress import say
from dpkd.teacher_cache.engines.engine import (
    EngineOptions,
    EngineResult,
    FailedRequest,
    GenerateRequest,
    Sampling,
    ScoreRequest,
    is_out_of_memory,
)
from dpkd.teacher_cache.engines.top_k import from_top_k
from dpkd.teacher_cache.engines.vllm.engine_args import parse_engine_args
from dpkd.teacher_cache.engines.vllm.environment import QUIET, cpu_environment, runs_on_cpu

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.logprobs import FlatLogprobs

    from dpkd.core.models import ModelSource

_Request = TypeVar("_Request", GenerateRequest, ScoreRequest)


@dataclass(frozen=True)
class _Broken(Generic[_Request]):
    """The engine's failure and the requests that were under way."""

    error: Exception
    requests: list[_Request]


class _FailureGuard:
    """Stops a job whose engine fails on one request after the other: then no request is the culprit."""

    _MOST_IN_A_ROW = 5

    def __init__(self) -> None:
        self._in_a_row = 0

    def answered(self) -> None:
        self._in_a_row = 0

    def failed(self, error: Exception) -> None:
        self._in_a_row += 1
        if self._in_a_row >= self._MOST_IN_A_ROW:
            raise UserError(
                f"vLLM fails on every request: {_first_line(error)}",
                advice="What is committed is kept; look at the engine, then run the same command again",
            ) from error


def _first_line(error: Exception) -> str:
    return first_line(error)[:200]


class VllmEngine:
    """A `vllm.LLM` driven request by request, so that responses come back as they finish.

    Log-probs are vLLM's `raw_logprobs` mode: full-vocabulary log-softmax before temperature and top-p.
    """

    name = "vllm"

    def __init__(self, model: ModelSource, options: EngineOptions) -> None:
        on_cpu = _prepare_environment(model, options)
        # scoring asks for one more token than it wants, hence a place more where the positions allow it
        max_model_len = min(options.max_length + 1, model.max_positions or options.max_length + 1)
        self._settings: dict[str, Any] = {
            "dtype": options.dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": options.max_num_seqs,
            "max_logprobs": options.top_k,
            "logprobs_mode": "raw_logprobs",
            # prompt log-probs come back in the wrong order with prefix caching (vLLM issue 42019)
            "enable_prefix_caching": False,
            "trust_remote_code": False,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "generation_config": "vllm",
        }
        if on_cpu:
            # a prompt cut into chunks rewinds its seeded generator, which torch's CPU generator cannot do
            self._settings |= {
                "enforce_eager": True,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(max_model_len, 2048),
            }
        self._settings |= parse_engine_args(options.engine_args)
        self._model, self._options = model, options
        self._max_model_len = max_model_len
        self._window = 2 * options.max_num_seqs
        self.vocab_size = model.vocab_size
        self._failed = False
        self._start()

    def _start(self) -> None:
        from vllm import LLM

        try:
            self._llm = LLM(str(self._model.path), **self._settings)
        except Exception as error:
            if is_out_of_memory(error):
                raise self._out_of_memory(error) from error
            if isinstance(error, (ValueError, RuntimeError)):
                raise UserError(f"vLLM cannot load the model: {_first_line(error)}", where=self._model.path) from error
            raise

    def _out_of_memory(self, error: Exception) -> UserError:
        return UserError(
            f"vLLM ran out of memory: {_first_line(error)}",
            where=self._model.path,
            advice=f"Lower --set max_num_seqs (now {self._options.max_num_seqs}), --max-new-tokens or --top-k, or give "
            "--engine-arg gpu_memory_utilization (on a CPU: VLLM_CPU_KVCACHE_SPACE, in GiB); what is committed is "
            "kept, the same command goes on",
        )

    def generate(
        self, requests: Iterable[GenerateRequest], sampling: Sampling
    ) -> Iterator[EngineResult | FailedRequest]:
        """See `Engine.generate`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        def to_params(request: GenerateRequest) -> SamplingParams:
            return SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=list(sampling.stop_token_ids),
                seed=request.seed if sampling.temperature > 0 else None,
                logprobs=self._options.top_k,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )

        def to_result(request: GenerateRequest, output: RequestOutput) -> EngineResult:
            completion = output.outputs[0]
            if completion.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM ended request {request.index} with {completion.finish_reason!r}")
            return self._result(
                request.index,
                np.asarray(completion.token_ids, np.int32),
                "stop" if completion.finish_reason == "stop" else "length",
                completion.logprobs,  # type: ignore[arg-type]
                first_position=0,
            )

        return self._answers(requests, lambda request: list(request.prompt_ids), to_params, to_result)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[EngineResult | FailedRequest]:
        """See `Engine.score`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,  # vLLM refuses 0
            prompt_logprobs=self._options.top_k,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

        def sequence(request: ScoreRequest) -> list[int]:
            ids = [*map(int, request.prompt_ids), *map(int, request.response_ids)]
            if len(ids) >= self._max_model_len:
                raise UserError(
                    "a sequence to score leaves no place for vLLM's own token",
                    found=f"{len(ids)} tokens",
                    expected=f"fewer than {self._max_model_len}",
                    advice="Lower --max-prompt-tokens or --max-new-tokens, or choose --engine transformers",
                )
            return ids

        def to_result(request: ScoreRequest, output: RequestOutput) -> EngineResult:
            return self._result(
                request.index,
                np.asarray(request.response_ids, np.int32),
                "stop",
                output.prompt_logprobs,  # type: ignore[arg-type]
                first_position=len(request.prompt_ids),
            )

        return self._answers(requests, sequence, lambda _: params, to_result)

    def _answers(
        self,
        requests: Iterable[_Request],
        to_ids: Callable[[_Request], list[int]],
        to_params: Callable[[_Request], SamplingParams],
        to_result: Callable[[_Request, RequestOutput], EngineResult],
    ) -> Iterator[EngineResult | FailedRequest]:
        # closing this generator closes the run, which takes its requests back from the engine
        with contextlib.closing(self._run(requests, to_ids, to_params)) as run:
            for request, output in run:
                yield output if isinstance(output, FailedRequest) else to_result(request, output)

    def _run(
        self,
        requests: Iterable[_Request],
        to_ids: Callable[[_Request], list[int]],
        to_params: Callable[[_Request], SamplingParams],
    ) -> Generator[tuple[_Request, RequestOutput | FailedRequest], None, None]:
        """Answers to all requests; those under way when the engine fails are tried again in smaller groups."""
        source = iter(requests)
        guard = _FailureGuard()
        while True:
            broken = yield from self._stream(source, to_ids, to_params)
            if broken is None:
                return
            yield from self._isolate(broken, to_ids, to_params, guard)

    def _stream(
        self,
        source: Iterator[_Request],
        to_ids: Callable[[_Request], list[int]],
        to_params: Callable[[_Request], SamplingParams],
    ) -> Generator[tuple[_Request, RequestOutput | FailedRequest], None, _Broken[_Request] | None]:
        """Keep the engine full while pulling from `source` no faster than places fall free.

        Returns None when the source is answered, or the error and the requests under way when the engine fails.
        """
        from vllm import TokensPrompt
        from vllm.exceptions import VLLMClientError

        if self._failed:
            self._restart()
        engine = self._llm.llm_engine
        waiting: dict[str, tuple[str, _Request]] = {}
        exhausted = False
        try:
            while True:
                while not exhausted and len(waiting) < self._window:
                    request = next(source, None)
                    if request is None:
                        exhausted = True
                        break
                    prompt = TokensPrompt(prompt_token_ids=to_ids(request))
                    key = str(request.index)
                    try:
                        waiting[key] = (engine.add_request(key, prompt, to_params(request)), request)
                    except (ValueError, VLLMClientError) as error:  # refused by name: to try again would change nothing
                        yield request, FailedRequest(request.index, f"vLLM refuses it: {_first_line(error)}")
                if not waiting:
                    return None
                try:
                    outputs = engine.step()
                except Exception as error:
                    broken = _Broken(error, [request for _, request in waiting.values()])
                    waiting.clear()
                    self._failed = True
                    return broken
                for output in outputs:
                    if output.finished:
                        yield waiting.pop(output.request_id)[1], output  # type: ignore[misc]
        finally:
            if waiting:
                engine.abort_request([internal_id for internal_id, _ in waiting.values()], internal=True)

    def _isolate(
        self,
        broken: _Broken[_Request],
        to_ids: Callable[[_Request], list[int]],
        to_params: Callable[[_Request], SamplingParams],
        guard: _FailureGuard,
    ) -> Iterator[tuple[_Request, RequestOutput | FailedRequest]]:
        """Answer the requests of a failed batch by halves; the next stream starts a fresh engine.

        The request that fails alone, twice, is the culprit.
        """
        if is_out_of_memory(broken.error):
            raise self._out_of_memory(broken.error) from broken.error
        say(f"vLLM failed ({_first_line(broken.error)}); starting it again for {len(broken.requests)} requests")
        groups = [broken.requests[: len(broken.requests) // 2], broken.requests[len(broken.requests) // 2 :]]
        for group in filter(None, groups):
            again = yield from self._stream(iter(group), to_ids, to_params)
            if again is not None and len(group) == 1:
                guard.failed(again.error)
                yield group[0], FailedRequest(group[0].index, f"vLLM fails on it: {_first_line(again.error)}")
            elif again is not None:
                yield from self._isolate(again, to_ids, to_params, guard)
            else:
                guard.answered()

    def _restart(self) -> None:
        try:
            self.close()
        except Exception as error:  # it is broken already; what matters is whether a new one starts
            say(f"the failed engine did not close cleanly: {_first_line(error)}")
        self._start()
        self._failed = False

    def _result(
        self,
        index: int,
        response_ids: np.ndarray,
        finish_reason: Any,
        flat: FlatLogprobs,
        first_position: int,
    ) -> EngineResult:
        """Rows of `flat` hold K + 1 entries: the response's own token, then the top K in rank order."""
        num_positions, width = len(response_ids), self._options.top_k + 1
        start = flat.start_indices[first_position] if num_positions else 0
        stop = start + num_positions * width
        if num_positions and flat.end_indices[first_position + num_positions - 1] != stop:
            raise RuntimeError(f"vLLM returned rows of another width than {width} for request {index}")
        # fromiter takes a list's numbers as they come, where asarray looks at all of them first
        ids_TW = np.fromiter(flat.token_ids[start:stop], np.int32, stop - start).reshape(num_positions, width)
        logprobs_TW = np.fromiter(flat.logprobs[start:stop], np.float32, stop - start).reshape(num_positions, width)
        if not np.array_equal(ids_TW[:, 0], response_ids):
            raise RuntimeError(f"vLLM's log-probs of request {index} belong to other tokens than its response")
        distributions = None
        if self._options.top_k:
            distributions = from_top_k(
                ids_TW[:, 1:],
                logprobs_TW[:, 1:],
                response_ids,
                logprobs_TW[:, 0],
                self.vocab_size,
                self._options.top_mass,
            )
        return EngineResult(index, response_ids, finish_reason, logprobs_TW[:, 0].copy(), distributions)

    def close(self) -> None:
        """Stop the engine and free its memory, so that another one can start in this process."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _prepare_environment(model: ModelSource, options: EngineOptions) -> bool:
    """Set vLLM's environment where the user has not; True when it runs on the CPU."""
    on_cpu = runs_on_cpu(options.device)
    wanted = dict(QUIET)
    if on_cpu:
        # one process instead of three: starts in 5 s instead of 20 s, and leaves no orphan behind
        wanted["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        wanted |= cpu_environment(model, options.max_length, options.max_num_seqs)
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\..*")
    return on_cpu
