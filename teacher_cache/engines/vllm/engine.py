"""The vLLM engine: continuous batching in this process, token ids in and out (checked against vLLM 0.32)."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dpkd.core.devices import is_out_of_memory
from dpkd.core.errors import UserError, first_line
from dpkd.core.progress import say
from dpkd.teacher_cache.engines.engine import (
    Engine,
    EngineOptions,
    EngineResult,
    FailedRequest,
    FinishReason,
    GenerateRequest,
    Sampling,
    ScoreRequest,
)
from dpkd.teacher_cache.engines.top_k import build_result
from dpkd.teacher_cache.engines.vllm.engine_args import parse_engine_args
from dpkd.teacher_cache.engines.vllm.environment import (
    check_temperature,
    own_environment,
    own_settings,
    runs_on_cpu,
    sequence_limit,
)

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.logprobs import FlatLogprobs

    from dpkd.core.models import ModelSource


@dataclass(frozen=True)
class _Prepared:
    """A request in the form that vLLM takes, and the function from its output to the result."""

    index: int
    ids: list[int]
    params: SamplingParams
    to_result: Callable[[RequestOutput], EngineResult]


#: requests in a row that fail alone: then they are not to blame
_MOST_FAILURES = 5


def _first_line(error: Exception) -> str:
    return first_line(error)[:200]


#: an error of the engine, and the requests that were running
_Failure = tuple[Exception, list[_Prepared]]


def _params(**values: Any) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **values)


class VllmEngine(Engine):
    """A `vllm.LLM` that is given request by request, so that responses come back as they finish.

    Log-probs are those of vLLM's mode `raw_logprobs`: the full-vocabulary log-softmax before temperature and top-p.
    """

    name = "vllm"
    #: ids that may be generated; None: all
    allowed_token_ids: list[int] | None = None

    def __init__(self, model: ModelSource, options: EngineOptions) -> None:
        on_cpu = runs_on_cpu(options.device)
        for name, value in own_environment(on_cpu=on_cpu).items():
            os.environ.setdefault(name, value)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\..*")
        self._settings = own_settings(
            model,
            dtype=options.dtype,
            max_length=options.max_length,
            top_k=options.top_k,
            num_sequences=options.max_num_seqs,
            on_cpu=on_cpu,
        )
        self._settings |= {
            "max_num_seqs": options.max_num_seqs,
            "trust_remote_code": False,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        self._settings |= parse_engine_args(options.engine_args)
        self._model, self._options = model, options
        self._max_model_len = sequence_limit(model, options.max_length)
        self._window = 2 * options.max_num_seqs
        self.vocab_size = model.vocab_size
        self._broken = False
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
            advice=f"Lower --max-num-seqs (now {self._options.max_num_seqs}), --max-new-tokens or --top-k, or give "
            "--engine-arg gpu_memory_utilization (on a CPU: kv_cache_memory_bytes, or VLLM_CPU_KVCACHE_SPACE in GiB), "
            "then run the same command again: it resumes",
        )

    def generate(
        self, requests: Iterable[GenerateRequest], sampling: Sampling
    ) -> Iterator[EngineResult | FailedRequest]:
        check_temperature(sampling.temperature)

        def prepare(request: GenerateRequest) -> _Prepared:
            params = _params(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=list(sampling.stop_token_ids),
                ignore_eos=True,  # it is one of the stop ids, or not meant to end a response
                allowed_token_ids=self.allowed_token_ids,
                seed=request.seed if sampling.temperature > 0 else None,
                logprobs=self._options.top_k,
            )
            return _Prepared(request.index, list(request.prompt_ids), params, partial(self._generated, request.index))

        return self._run(map(prepare, requests))

    def _generated(self, index: int, output: RequestOutput) -> EngineResult:
        completion = output.outputs[0]
        if completion.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended request {index} with {completion.finish_reason!r}")
        reason: FinishReason = "stop" if completion.finish_reason == "stop" else "length"
        ids = np.asarray(completion.token_ids, np.int32)
        return self._result(index, ids, reason, completion.logprobs, first_position=0)  # type: ignore[arg-type]

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[EngineResult | FailedRequest]:
        params = _params(temperature=0.0, max_tokens=1, prompt_logprobs=self._options.top_k)  # vLLM refuses 0 tokens

        def prepare(request: ScoreRequest) -> _Prepared:
            ids = [*map(int, request.prompt_ids), *map(int, request.response_ids)]
            if len(ids) >= self._max_model_len:
                raise UserError(
                    "a sequence to score is too long: vLLM generates one more token",
                    found=f"{len(ids)} tokens",
                    expected=f"fewer than {self._max_model_len}",
                    advice="Lower --max-prompt-tokens or --max-new-tokens, or choose --engine transformers",
                )
            return _Prepared(request.index, ids, params, partial(self._scored, request))

        return self._run(map(prepare, requests))

    def _scored(self, request: ScoreRequest, output: RequestOutput) -> EngineResult:
        ids, first_position = np.asarray(request.response_ids, np.int32), len(request.prompt_ids)
        return self._result(request.index, ids, "stop", output.prompt_logprobs, first_position)  # type: ignore[arg-type]

    def _run(self, source: Iterator[_Prepared]) -> Iterator[EngineResult | FailedRequest]:
        """Answers to all requests. If the engine fails, those that were running are tried again in smaller groups."""
        self._failed_in_a_row = 0
        while (failure := (yield from self._stream(source))) is not None:
            yield from self._isolate(*failure)

    def _stream(self, source: Iterator[_Prepared]) -> Generator[EngineResult | FailedRequest, None, _Failure | None]:
        """Keep the engine full, reading from `source` only as it has capacity.

        Returns None when all requests are answered; otherwise the engine's error and the requests that were running.
        """
        from vllm import TokensPrompt
        from vllm.exceptions import VLLMClientError

        if self._broken:
            self._restart()
        engine = self._llm.llm_engine
        running: dict[str, tuple[str, _Prepared]] = {}
        exhausted = False
        try:
            while True:
                while not exhausted and len(running) < self._window:
                    request = next(source, None)
                    if request is None:
                        exhausted = True
                        break
                    prompt, key = TokensPrompt(prompt_token_ids=request.ids), str(request.index)
                    try:
                        running[key] = (engine.add_request(key, prompt, request.params), request)
                    except (ValueError, VLLMClientError) as error:  # trying again would change nothing
                        yield FailedRequest(request.index, f"vLLM refuses it: {_first_line(error)}")
                if not running:
                    return None
                try:
                    outputs = engine.step()
                except Exception as error:
                    requests = [request for _, request in running.values()]
                    running.clear()
                    self._broken = True
                    return error, requests
                for output in outputs:
                    if output.finished:
                        yield running.pop(output.request_id)[1].to_result(output)  # type: ignore[arg-type]
        finally:
            if running:  # the caller has closed this generator
                engine.abort_request([internal_id for internal_id, _ in running.values()], internal=True)

    def _isolate(self, error: Exception, requests: list[_Prepared]) -> Iterator[EngineResult | FailedRequest]:
        """Answer the requests of a failed batch in halves, each with a new engine, to find the one that fails alone."""
        if is_out_of_memory(error):
            raise self._out_of_memory(error) from error
        say(f"vLLM failed ({_first_line(error)}); restarting it for {len(requests)} requests")
        half = len(requests) // 2
        for group in filter(None, (requests[:half], requests[half:])):
            failure = yield from self._stream(iter(group))
            if failure is None:
                self._failed_in_a_row = 0
            elif len(group) > 1:
                yield from self._isolate(*failure)
            else:
                self._failed_in_a_row += 1
                if self._failed_in_a_row >= _MOST_FAILURES:
                    raise UserError(
                        f"vLLM fails on every request: {_first_line(failure[0])}",
                        advice="Committed shards are kept. Look at the error, then run the same command again",
                    ) from failure[0]
                yield FailedRequest(group[0].index, f"vLLM fails on it: {_first_line(failure[0])}")

    def _restart(self) -> None:
        try:
            self.close()
        except Exception as error:  # only the start of the new one matters
            say(f"the failed engine did not close cleanly: {_first_line(error)}")
        self._start()
        self._broken = False

    def _result(
        self, index: int, response_ids: np.ndarray, reason: FinishReason, flat: FlatLogprobs, first_position: int
    ) -> EngineResult:
        """The result from rows of K + 1 entries in `flat`: the response's own token, then the top K in rank order."""
        num_positions, width = len(response_ids), self._options.top_k + 1
        start = flat.start_indices[first_position] if num_positions else 0
        stop = start + num_positions * width
        if num_positions and flat.end_indices[first_position + num_positions - 1] != stop:
            raise RuntimeError(f"vLLM did not return {width} entries per position for request {index}")
        # fromiter reads the list once; asarray would look at all of it first
        ids_TW = np.fromiter(flat.token_ids[start:stop], np.int32, stop - start).reshape(num_positions, width)
        logprobs_TW = np.fromiter(flat.logprobs[start:stop], np.float32, stop - start).reshape(num_positions, width)
        if not np.array_equal(ids_TW[:, 0], response_ids):
            raise RuntimeError(f"vLLM's log-probs of request {index} belong to other tokens than its response")
        own_T, top_k = logprobs_TW[:, 0].copy(), (ids_TW[:, 1:], logprobs_TW[:, 1:])
        return build_result(index, response_ids, reason, own_T, *top_k, self.vocab_size, self._options)

    def close(self) -> None:
        """Stop the engine and free its memory, so that another engine can start in this process."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        cleanup_dist_env_and_memory()
