"""How many rows of an evaluation set also stand in the cache that a model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.progress import say
from dpkd.core.prompts.templates import PromptEncoder
from dpkd.evaluate.inputs.eval_sets import EvalSet
from dpkd.evaluate.inputs.models import Candidate
from dpkd.teacher_cache.store.reader import TeacherCache


def count_overlap(location: str, candidates: Sequence[Candidate], eval_sets: Sequence[EvalSet]) -> dict[str, Any]:
    """The cache's fingerprint and, for each set, the number and the ids of the rows whose prompt it holds.

    Prompts are compared as texts in the cache's own template. Every shard's checksum is checked on the way. Raises
    `UserError` for a cache that cannot be read, and for one whose template cannot be made here.
    """
    cache = TeacherCache.open(location)
    template = cache.identities["template"]
    encoder = PromptEncoder(candidates[0].source.tokenizer, template["name"])
    if encoder.identity() != template:
        raise UserError(
            "the cache's prompts have another template, so that they cannot be compared",
            found=f"{template['name']} (sha256 {template['sha256'][:12]})",
            expected=f"sha256 {encoder.identity()['sha256'][:12]} of {candidates[0].source.name}",
            where=cache.folder,
            advice="Give a model with the cache's tokenizer first, or leave --cache out",
        )
    held: set[str] = set()
    for _, shard in cache.scan(cache.manifest.shards):
        held.update(shard.texts(index)[0] for index in range(len(shard)))
    rows = {
        eval_set.name: [example.example_id for example in eval_set.examples if encoder.prompt(example).text in held]
        for eval_set in eval_sets
    }
    for name, found in rows.items():
        if found:
            say(f"data {name}: {len(found)} prompts also stand in the cache {location} (report.json lists them)")
    return {"cache": cache.fingerprint, "rows": rows}
