"""The README.md of a trained student, as model hubs read it: what it was made of, and its metrics."""

from __future__ import annotations

import json
from typing import Any

from huggingface_hub import ModelCardData

from dpkd.core.markdown import markdown_table
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.run.setup import Run

_METRICS = ("loss", "kld", "rkld", "reward_margin", "preference_accuracy", "top1_agreement", "rouge_l")
_CARD = """---
{front}
---

# {student}, distilled

Trained with [Direct Preference Knowledge Distillation](https://arxiv.org/abs/2406.19774) by `dpkd`.

{provenance}
## Metrics

{metrics}
## How to train it again

```
dpkd train --config dpkd.toml
```

```toml
{options}
```
"""


def model_card(run: Run, steps: int, training: dict[str, Any] | None, validation: dict[str, Any] | None) -> str:
    """Markdown with YAML front matter; `training` and `validation` are the last lines of their logs, if any."""
    config, facts = run.config, run.facts
    lora = config.lora_rank is not None
    front = ModelCardData(
        library_name="peft" if lora and config.lora_save == "adapter" else "transformers",
        base_model=facts["student"]["name"],
        pipeline_tag="text-generation",
        tags=["dpkd", "knowledge-distillation", *(["lora"] if lora else [])],
    )
    data = facts.get("data") and json.dumps(facts["data"], ensure_ascii=False)
    provenance = [
        ("Student before training", _named(facts["student"])),
        *(_caches(run) or [("Teacher", "none: trained on reference responses")]),
        ("Data", data),
        ("Prompt template", facts["template"]["name"]),
        ("Objective", _objective(config)),
        ("Text corpus", facts.get("corpus") and json.dumps(facts["corpus"])),
        ("Adapters", config.lora_rank and f"LoRA of rank {config.lora_rank}, {config.lora_save}"),
        ("Steps", steps),
        ("Software", ", ".join(f"{name} {version}" for name, version in facts["software"].items())),
    ]
    return _CARD.format(
        front=front.to_yaml().strip(),
        student=facts["student"]["name"],
        provenance=markdown_table(["", ""], [row for row in provenance if row[1]], left=2),
        metrics=_metrics(training, validation),
        options=config.model_copy(update={"out": config.out.name}).to_toml().strip(),
    )


def _caches(run: Run) -> list[tuple[str, str | None]]:
    """What the student learnt from: teacher, cache, round and data, of several caches each with its name."""
    lines: list[tuple[str, str | None]] = []
    for number, cache in enumerate(run.caches):
        identities, of_round = cache.reader.identities, cache.student_round
        name = "" if run.shares is None else f" {cache.choice.name}"
        share = "" if run.shares is None else f", {run.shares.shares[number]:.1%} of the rows"
        lines += [
            (f"Teacher{name}", _named(identities["teacher"])),
            (f"Teacher cache{name}", f"{cache.reader.fingerprint}{share}"),
            (f"Round of student responses{name}", None if of_round is None else of_round.manifest.fingerprint),
            (f"Data{name}", json.dumps(identities["data"], ensure_ascii=False)),
        ]
    return lines


def _named(identity: dict[str, Any]) -> str:
    revision = f", revision `{identity['revision']}`" if identity.get("revision") else ""
    weights = f", weights sha256 `{identity['weights_sha256'][:12]}`" if identity.get("weights_sha256") else ""
    return f"`{identity['name']}`{revision}{weights}"


def _objective(config: TrainConfig) -> str:
    terms = " + ".join(f"{weight:g} {name}" for name, weight in config.weights.items())
    preset = f", preset `{config.preset}`" if config.preset else ""
    return f"`{config.objective}`, level `{config.level}`, beta {config.beta:g}{preset}; terms: {terms}"


def _metrics(training: dict[str, Any] | None, validation: dict[str, Any] | None) -> str:
    columns = {name: line for name, line in (("last step", training), ("validation", validation)) if line is not None}
    of_caches = [key for line in columns.values() for key in line if key.startswith("kld/")]
    rows = [
        [key, *("" if line.get(key) is None else f"{line[key]:.4f}" for line in columns.values())]
        for key in dict.fromkeys([*_METRICS, *of_caches])
        if any(line.get(key) is not None for line in columns.values())
    ]
    if not rows:
        return "No metrics were recorded.\n"
    return markdown_table(["", *(f"{name} (step {line['step']})" for name, line in columns.items())], rows)
