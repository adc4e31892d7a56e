"""The models to evaluate: located, identified, and checked against the options before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource, locate_model
from dpkd.core.prompts.templates import PromptEncoder
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.teacher_cache.engines.open import check_fits


@dataclass(frozen=True)
class Candidate:
    """One model under its name in the report; `identity` says what it is by content, not by path."""

    name: str
    source: ModelSource
    encoder: PromptEncoder
    identity: dict[str, Any]


def open_candidates(config: EvalConfig) -> list[Candidate]:
    """The models of `config`, in its order.

    Raises `UserError` for a directory without a checkpoint, a checkpoint trained with another template, and one with
    too few positions for prompt and answer. Hashes weights but loads none.
    """
    candidates = []
    for name, path in config.model.items():
        source = locate_model(path, f"model {name}")
        encoder = PromptEncoder(source.tokenizer, config.template, config.template_arg)
        _check_template(source, encoder)
        # the engine checks this too, but only after the earlier models have answered
        check_fits(source, config.engine_options())
        model, tokenizer = source.identity(config.dtype), source.tokenizer_identity()
        identity = {"model": model, "tokenizer": tokenizer, "template": encoder.identity()}
        candidates.append(Candidate(name, source, encoder, identity))
    return candidates


def _check_template(source: ModelSource, encoder: PromptEncoder) -> None:
    """Raise `UserError` if the checkpoint records another template than the one of the options."""
    trained_with, asked_with = source.trained_template(), encoder.identity()
    if trained_with is None or all(trained_with[key] == asked_with[key] for key in ("name", "sha256")):
        return
    other_text = trained_with["name"] == asked_with["name"]
    raise UserError(
        "the model was trained with another prompt template" + (" of the same name" if other_text else ""),
        found=f"{trained_with['name']} (sha256 {trained_with['sha256'][:12]}) in the checkpoint",
        expected=f"{asked_with['name']} (sha256 {asked_with['sha256'][:12]})",
        where=source.path / "dpkd.json",
        advice="Give the --template-arg of the training, or train again with the template of this version"
        if other_text
        else f"Give --template {trained_with['name']}",
    )
