"""Choose an engine by name, check that it can run the model, and start it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from dpkd.core.errors import UserError
from dpkd.teacher_cache.engines.engine import Engine, EngineName, EngineOptions, ResolvedEngine
from dpkd.teacher_cache.engines.vllm.environment import check_temperature

if TYPE_CHECKING:
    from dpkd.core.models import ModelSource

_INSTALL_VLLM = "pip install -e '.[teacher-cpu]' or '.[teacher-gpu]'"
_INSTALL = {
    "vllm": f"In the clone: {_INSTALL_VLLM}, or choose --engine transformers",
    "ray": "In the clone: pip install -e '.[ray]', or choose another --engine",
}


def resolve_engine(name: EngineName) -> ResolvedEngine:
    """`auto` is vLLM if it is installed, else transformers. Raises `UserError` if the named engine is not installed."""
    if name == "auto":
        return "transformers" if find_spec("vllm") is None else "vllm"
    if name in _INSTALL and find_spec(name) is None:
        raise UserError(f"the engine {name} is not installed", advice=_INSTALL[name])
    return name


def check_engine(
    name: ResolvedEngine, model: ModelSource, options: EngineOptions, *, scores: bool, temperature: float = 0.0
) -> None:
    """Raise `UserError` for options that `model` or the engine cannot take; starts nothing.

    `scores`: whether the engine will score given responses. `temperature`: at which it will draw some.
    """
    check_fits(model, options)
    if name == "transformers" and options.engine_args:  # of `auto`: the options refuse --engine transformers
        raise UserError(
            "--engine-arg is for vLLM, which is not installed, and transformers takes none",
            found=", ".join(f"{key}={value}" for key, value in options.engine_args.items()),
            advice=f"Leave --engine-arg out, or install vLLM. In the clone: {_INSTALL_VLLM}",
        )
    if name in ("vllm", "ray", "server"):
        check_temperature(temperature)
    if name in ("vllm", "ray"):
        from dpkd.teacher_cache.engines.vllm.engine_args import check_engine_args

        check_engine_args(options.engine_args, scores=scores)


def check_fits(model: ModelSource, options: EngineOptions) -> None:
    """Raise `UserError` if `model` has too few positions or too small a vocabulary for `options`."""
    if options.top_k > model.vocab_size:
        raise UserError(
            "top-k is larger than the vocabulary",
            found=options.top_k,
            expected=f"at most {model.vocab_size}",
            where=model.name,
            advice="Lower --top-k",
        )
    if model.max_positions is not None and options.max_length > model.max_positions:
        raise UserError(
            "prompt and response are longer than the model's positions",
            found=f"{options.max_length} tokens",
            expected=f"at most {model.max_positions}",
            where=model.name,
            advice="Lower --max-prompt-tokens or --max-new-tokens",
        )


def open_engine(name: ResolvedEngine, model: ModelSource, options: EngineOptions) -> Engine:
    """Start the engine in this process, or connect to its servers.

    Not the engine `ray`, which runs in several processes (`build/ray`), and not `openai`, which is measured first
    (`build/filling.py`). Raises `UserError` when `model` does not fit `options` or cannot be loaded.
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
    raise ValueError(f"the engine {name} is not opened here")
