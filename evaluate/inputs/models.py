"""The models to evaluate: located, identified, and checked against the options before anything runs."""

from __future__ import annotations

import json
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
        encoder = PromptEncoder(source.tokenizer, config.template)
        _check_template(source, encoder)
        # the engine checks this too, but only after the earlier models have answered
        check_fits(source, config.engine_options())
        candidates.append(Candidate(name, source, encoder, _identity(source, encoder, config)))
    return candidates


def _identity(source: ModelSource, encoder: PromptEncoder, config: EvalConfig) -> dict[str, Any]:
    return {
        "model": source.identity(config.dtype),
        "tokenizer": source.tokenizer_identity(),
        "template": encoder.identity(),
    }


def _check_template(source: ModelSource, encoder: PromptEncoder) -> None:
    """Raise `UserError` if the checkpoint records another template than the one of the options."""
    path = source.path / "dpkd.json"
    if not path.is_file():
        return  # not a checkpoint of dpkd: only the option can tell
    try:
        trained = json.loads(path.read_text(encoding="utf-8"))["template"]
        trained_with = {key: str(trained[key]) for key in ("name", "sha256")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the checkpoint's dpkd.json has no template: {type(error).__name__} {error}",
            where=path,
            advice="Delete the file to evaluate with the template of --template",
        ) from None
    asked_with = encoder.identity()
    if trained_with == asked_with:
        return
    other_text = trained_with["name"] == asked_with["name"]
    raise UserError(
        "the model was trained with another prompt template" + (" of the same name" if other_text else ""),
        found=f"{trained_with['name']} (sha256 {trained_with['sha256'][:12]}) in the checkpoint",
        expected=f"{asked_with['name']} (sha256 {asked_with['sha256'][:12]})",
        where=path,
        advice="Train it again with the template of this version"
        if other_text
        else f"Give --template {trained_with['name']}",
    )
