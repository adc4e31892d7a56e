"""What vLLM is told by its environment, here and in a server of its own (checked against vLLM 0.32)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dpkd.core.devices import choose_device
from dpkd.core.errors import UserError

if TYPE_CHECKING:
    from dpkd.core.models import ModelSource

#: of every vLLM: it says what goes wrong, and nothing to anyone else
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}

_LEAST_GIB, _MOST_GIB = 1, 8  # of a KV cache in memory


def runs_on_cpu(device: str) -> bool:
    """Whether vLLM computes on the CPU; raises `UserError` where `device` (auto, cpu, cuda) asks for what is not so."""
    if device == "cpu" and choose_device("auto").type == "cuda":
        raise UserError(
            "vLLM runs on the device it was built for",
            found="--device cpu",
            expected="cuda",
            advice="Leave --device out; `dpkd cache-teacher --engine transformers` stays on the CPU",
        )
    return choose_device(device).type == "cpu"


def cpu_environment(model: ModelSource, max_length: int, num_sequences: int) -> dict[str, str]:
    """Variables for a CPU: every core, and a KV cache of a quarter more than `num_sequences` of `max_length` tokens."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    position_bytes = 2 * config.num_hidden_layers * heads * head_size * 4
    needed_gib = math.ceil(1.25 * position_bytes * max_length * num_sequences / 2**30)
    return {
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(min(max(needed_gib, _LEAST_GIB), _MOST_GIB)),
    }
