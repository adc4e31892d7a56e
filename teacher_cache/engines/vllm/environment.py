"""What dpkd sets for every vLLM, in this process and in a server: arguments and environment (checked against 0.32)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dpkd.core.devices import choose_device
from dpkd.core.errors import UserError

if TYPE_CHECKING:
    from dpkd.core.models import ModelSource

_GIB = 2**30
_MIN_GIB, _MAX_GIB = 1, 8  # of the KV cache on a CPU
_LOWEST_TEMPERATURE, _HIGHEST_TEMPERATURE = 0.01, 2.0


def runs_on_cpu(device: str) -> bool:
    """Whether vLLM computes on the CPU; raises `UserError` if this vLLM cannot use `device` (auto, cpu or cuda)."""
    if device == "cpu" and choose_device("auto").type == "cuda":
        raise UserError(
            "vLLM runs only on the device that it was built for",
            found="--device cpu",
            expected="cuda",
            advice="Leave --device out; `dpkd cache-teacher --engine transformers` can use the CPU",
        )
    return choose_device(device).type == "cpu"


def check_temperature(temperature: float) -> None:
    """Raise `UserError` for a sampling temperature that vLLM refuses, or raises to 0.01 with a warning."""
    if temperature and not _LOWEST_TEMPERATURE <= temperature <= _HIGHEST_TEMPERATURE:
        raise UserError(
            "vLLM cannot draw at this temperature",
            found=f"{temperature:g}",
            expected=f"0, or {_LOWEST_TEMPERATURE:g} to {_HIGHEST_TEMPERATURE:g}",
            advice="Give another --temperature, or --engine transformers",
        )


def sequence_limit(model: ModelSource, max_length: int) -> int:
    """Longest sequence that vLLM must take for `max_length` tokens of prompt and response.

    vLLM generates one token when it scores, so this is one more if the model has the positions.
    """
    return min(max_length + 1, model.max_positions or max_length + 1)


def own_settings(
    model: ModelSource, *, dtype: str, max_length: int, top_k: int, num_sequences: int, on_cpu: bool
) -> dict[str, Any]:
    """The arguments of vLLM's `EngineArgs` that a cache depends on.

    On a CPU also a KV cache for a quarter more than `num_sequences` of `max_length` tokens.
    """
    limit = sequence_limit(model, max_length)
    settings: dict[str, Any] = {
        "dtype": dtype,
        "max_model_len": limit,
        "max_logprobs": max(top_k, 1),
        "logprobs_mode": "raw_logprobs",
        # prompt log-probs come back in the wrong order with prefix caching (vLLM issue 42019)
        "enable_prefix_caching": False,
        "generation_config": "vllm",
    }
    if on_cpu:
        # a prompt cut into chunks rewinds its seeded generator, which torch's CPU generator cannot do
        settings |= {"enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": max(limit, 2048)}
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        position_bytes = 2 * config.num_hidden_layers * heads * head_size * 4
        needed_gib = math.ceil(1.25 * position_bytes * max_length * num_sequences / _GIB)
        # not by VLLM_CPU_KVCACHE_SPACE: it would hold for the next model in this process, and against --engine-arg
        settings["kv_cache_memory_bytes"] = min(max(needed_gib, _MIN_GIB), _MAX_GIB) * _GIB
    return settings


def own_environment(*, on_cpu: bool) -> dict[str, str]:
    """Environment variables for vLLM: errors only, no usage statistics.

    On a CPU also every core, and no worker process beside the engine: two processes would spin while they wait for each
    other.
    """
    variables = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    if on_cpu:
        variables |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    return variables
