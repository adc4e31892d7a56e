"""vLLM's own arguments as `key=value` texts: checked, converted, and none that would silently change a cache."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any

from dpkd.core.errors import UserError

#: arguments that dpkd sets itself, and the option for each; another value would make the cache wrong
_OURS = {
    "model": "--teacher",
    "tokenizer": "--teacher",
    "dtype": "--dtype",
    "max_model_len": "--max-prompt-tokens and --max-new-tokens",
    "max_num_seqs": "--max-num-seqs",
    "max_logprobs": "--top-k",
    "seed": "--seed",
    "logprobs_mode": None,
    "trust_remote_code": None,
    "generation_config": None,
    "override_generation_config": None,
    "logits_processors": None,
    "skip_tokenizer_init": None,
    "runner": None,
    "convert": None,
    "enable_lora": None,
    "stream_interval": None,
}

#: prefixes of arguments that change where and how fast a model runs, not its answers: a job may resume with others
_PLACEMENT = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
    "distributed_",
    "master_",
    "nnodes",
    "node_rank",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_num_batched_tokens",
    "max_num_scheduled_tokens",
    "long_prefill_token_threshold",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "prefix_caching_hash_algo",
    "enforce_eager",
    "cpu_offload_",
    "offload_",
    "safetensors_load_strategy",
    "max_parallel_loading_workers",
    "block_size",
    "num_gpu_blocks_override",
    "async_scheduling",
    "scheduling_policy",
    "download_dir",
    "numa_",
    "device_ids",
    "optimization_level",
    "performance_mode",
)


def result_changing(arguments: Mapping[str, str]) -> dict[str, str]:
    """The `arguments` that can change a log-prob, such as quantisation. They are part of the cache's identity."""
    return {key: value for key, value in sorted(arguments.items()) if not key.startswith(_PLACEMENT)}


def check_engine_args(arguments: Mapping[str, str], *, scores: bool) -> None:
    """Raise `UserError` for an argument that vLLM does not know or cannot read, or that dpkd sets itself.

    `scores`: whether the engine will score given responses, which vLLM does wrong with prefix caching.
    """
    parsed = parse_engine_args(arguments)
    if scores and parsed.get("enable_prefix_caching"):
        raise UserError(
            "--engine-arg enable_prefix_caching cannot be used when responses are scored: "
            "vLLM returns prompt log-probs in the wrong order (vLLM issue 42019)",
            advice="Leave it out, or build a cache with --responses teacher",
        )


def parse_engine_args(arguments: Mapping[str, str]) -> dict[str, Any]:
    """The values of `arguments` in the types of vLLM's `EngineArgs`; raises `UserError` for one of the wrong type.

    A value that is valid JSON is read as JSON (`4`, `true`, `{"method": "ngram"}`), any other as text.
    """
    if not arguments:
        return {}
    for key in arguments:
        if key in _OURS:
            use = f"Use {_OURS[key]}" if _OURS[key] else "Leave it out"
            raise UserError(f"--engine-arg {key} is set by dpkd itself", advice=use)
    from vllm.engine.arg_utils import EngineArgs

    fields = {field.name: field.type for field in dataclasses.fields(EngineArgs)}
    parsed = {}
    for key, text in arguments.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            raise UserError(
                f"vLLM has no argument {key!r}",
                where="--engine-arg",
                advice=f"Did you mean {close[0]!r}?" if close else "Give the name of a field of vLLM's EngineArgs",
            )
        parsed[key] = _value(key, text, fields[key])
    return parsed


def _value(key: str, text: str, kind: Any) -> Any:
    from pydantic import TypeAdapter, ValidationError
    from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation

    try:
        value = json.loads(text)
    except ValueError:
        value = text
    try:
        adapter = TypeAdapter(kind)
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation, NameError):
        return value  # vLLM checks its own types when it starts
    for candidate in (value, text):
        try:
            adapter.validate_python(candidate, strict=True)
            return candidate
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]["msg"]
        except Exception:  # only vLLM can resolve this annotation
            return value
    raise UserError(
        f"the value of vLLM's argument {key!r} has the wrong type",
        found=repr(text),
        expected=problem[0].lower() + problem[1:],
        where="--engine-arg",
    )
