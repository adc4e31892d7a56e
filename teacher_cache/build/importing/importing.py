"""`dpkd cache import`: rows that another program has stored, as a cache that is checked like any other.

What the source does not say is recorded as unknown, and refused by the objectives that need it
(`distill/rows/requirements.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from dpkd.core.errors import UserError
from dpkd.core.models import ModelSource, locate_remote_model
from dpkd.core.progress import Progress
from dpkd.teacher_cache.build.assembling import ShardAssembler, ShardLayout
from dpkd.teacher_cache.build.importing.source import ImportSource, SourceFacts
from dpkd.teacher_cache.build.request import say_complete
from dpkd.teacher_cache.engines.engine import EngineResult
from dpkd.teacher_cache.options.derive import ImportConfig
from dpkd.teacher_cache.store.codec import GRID_NATS
from dpkd.teacher_cache.store.folders import open_folder
from dpkd.teacher_cache.store.job import Job
from dpkd.teacher_cache.store.reader import CACHE_KIND
from dpkd.teacher_cache.store.rows import PlannedRow

if TYPE_CHECKING:
    from dpkd.teacher_cache.store.manifest import Manifest


def import_cache(config: ImportConfig) -> Manifest:
    """Import the cache that `config` describes, or resume; returns the manifest, which lists failed rows.

    Raises `UserError` for a source, a tokenizer or an output that cannot be used.
    """
    model = locate_remote_model(config.tokenizer, config.teacher_name)
    source = _open(config, model)
    facts = source.facts()
    if not facts.num_rows:
        raise UserError("the source has no rows", where=config.source)
    job = Job(open_folder(config.out), CACHE_KIND, _identities(config, model, facts))
    with job.opened(config.to_toml(), {"teacher": facts.num_rows}) as manifest:
        if manifest is None:
            _fill(job, source, model, facts.num_rows, config)
            source.check_unchanged()
            manifest = job.finish([])
    say_complete(f"the cache {config.out}", manifest)
    return manifest


def _open(config: ImportConfig, model: ModelSource) -> ImportSource:
    if config.source_format == "jsonl":
        from dpkd.teacher_cache.build.importing.jsonl import JsonlSource

        return JsonlSource(config, model)
    from dpkd.teacher_cache.build.importing.distillkit import DistillKitSource

    return DistillKitSource(config, model)


def _fill(job: Job, source: ImportSource, model: ModelSource, num_rows: int, config: ImportConfig) -> None:
    layout = ShardLayout("teacher", config.rows_per_shard, "teacher")
    with (
        ShardAssembler(job, layout, model.decode) as assembler,
        Progress("import", num_rows, "rows", job.num_done()) as progress,
    ):
        results: dict[int, EngineResult] = {}

        def planned() -> Iterator[PlannedRow]:
            for index, row in enumerate(islice(source.rows(), num_rows)):
                if row.result is not None:
                    results[index] = row.result
                yield PlannedRow(index, row.example_id, 0, "teacher", row.prompt, row.prompt_ids, failed=row.failed)
                results.pop(index, None)  # of a shard that is committed already

        for plan in assembler.pending(planned()):
            assembler.add(replace(results[plan.index], index=plan.index))
            progress.advance()


def _identities(config: ImportConfig, model: ModelSource, facts: SourceFacts) -> dict[str, Any]:
    unknown = dict.fromkeys(facts.unknown, "unknown")
    return {
        "teacher": model.identity("unknown"),
        "tokenizer": model.tokenizer_identity(),
        "template": facts.template,
        "data": facts.data | {"limit": config.limit},
        "generation": {
            "engine": "imported",
            "format": config.source_format,
            "template": "unknown",
            "responses": "teacher",
            "temperature": "unknown",
            "top_p": "unknown",
            "num_samples": 1,
            "max_prompt_tokens": facts.longest_prompt,
            "max_new_tokens": facts.longest_response,
            "stop_token_ids": model.stop_token_ids(),
            "seed": "unknown",
        },
        "logprobs": {
            "mode": "imported" if facts.top_k or "responses" not in facts.unknown else "none",
            "temperature": "unknown",
            "unit": "nats",
            "top_k": facts.top_k,
            "entry_grid_nats": GRID_NATS,
            **unknown,
        },
        "layout": {"rows_per_shard": config.rows_per_shard},
    }
