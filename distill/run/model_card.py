"""The README.md of a trained student: what it was made of and how it measured, in the form that model hubs read."""

from __future__ import annotations

import json
from typing import Any

from dpkd.distill.options.train import TrainConfig
from dpkd.distill.run.setup import Run

_FIGURES = ("loss", "kld", "rkld", "reward_margin", "preference_accuracy", "top1_agreement", "rouge_l")


def model_card(run: Run, steps: int, training: dict[str, Any] | None, validation: dict[str, Any] | None) -> str:
    """Markdown with YAML front matter; `training` and `validation` are the last lines of metrics, where there are."""
    config, facts = run.config, run.facts
    adapter = config.lora_rank is not None and config.lora_save == "adapter"
    student = facts["student"]["name"]
    front = {
        "library_name": "peft" if adapter else "transformers",
        "base_model": student,
        "pipeline_tag": "text-generation",
        "tags": ["dpkd", "knowledge-distillation", *(["lora"] if config.lora_rank is not None else [])],
    }
    teacher = None if run.cache_identities is None else run.cache_identities["teacher"]
    made_of = [
        ("Student before training", _named(facts["student"])),
        ("Teacher", "none: trained on reference responses" if teacher is None else _named(teacher)),
        ("Teacher cache", facts.get("cache")),
        ("Round of student responses", facts.get("round")),
        ("Data", _data(run)),
        ("Prompt template", facts["template"]["name"]),
        ("Objective", _objective(config)),
        ("Text corpus", facts.get("corpus") and json.dumps(facts["corpus"])),
        ("Adapters", config.lora_rank and f"LoRA of rank {config.lora_rank}, {config.lora_save}"),
        ("Steps", steps),
        ("Software", ", ".join(f"{name} {version}" for name, version in facts["software"].items())),
    ]
    lines = [
        "---",
        # JSON is YAML, and needs no care about what a name may hold
        *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()),
        "---",
        "",
        f"# {student}, distilled",
        "",
        "Trained by [Direct Preference Knowledge Distillation](https://arxiv.org/abs/2406.19774) with `dpkd`.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in made_of if value),
        "",
        "## Measured",
        "",
        *_measures(training, validation),
        "",
        "## How to train it again",
        "",
        "```",
        "dpkd train --config dpkd.toml",
        "```",
        "",
        "```toml",
        config.model_copy(update={"out": config.out.name}).to_toml().strip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _named(identity: dict[str, Any]) -> str:
    revision = f", revision `{identity['revision']}`" if identity.get("revision") else ""
    weights = f", weights sha256 `{identity['weights_sha256'][:12]}`" if identity.get("weights_sha256") else ""
    return f"`{identity['name']}`{revision}{weights}"


def _data(run: Run) -> str | None:
    data = run.facts.get("data") or (run.cache_identities or {}).get("data")
    return None if data is None else json.dumps(data, ensure_ascii=False)


def _objective(config: TrainConfig) -> str:
    terms = " + ".join(f"{weight:g} {name}" for name, weight in config.weights.items())
    preset = f", preset `{config.preset}`" if config.preset else ""
    return f"`{config.objective}`, level `{config.level}`, beta {config.beta:g}{preset}; terms: {terms}"


def _measures(training: dict[str, Any] | None, validation: dict[str, Any] | None) -> list[str]:
    columns = [
        (name, line) for name, line in (("last step", training), ("held-out rows", validation)) if line is not None
    ]
    if not columns:
        return ["Nothing was measured."]
    rows = [
        [key, *("" if line.get(key) is None else f"{line[key]:.4f}" for _, line in columns)]
        for key in _FIGURES
        if any(line.get(key) is not None for _, line in columns)
    ]
    heads = ["", *(f"{name} (step {line['step']})" for name, line in columns)]
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]
