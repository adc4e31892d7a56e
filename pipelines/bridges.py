"""What joins two packages that do not import each other: registered in pyproject.toml, called through `load_bridge`.

`distill` measures Rouge-L while it trains; `evaluate` compares prompts and models with a teacher cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpkd.core.errors import UserError
from dpkd.core.models import locate_model
from dpkd.core.progress import say
from dpkd.core.prompts.templates import PromptEncoder

if TYPE_CHECKING:
    from dpkd.distill.options.train import TrainConfig
    from dpkd.distill.run.best import EvaluateFn, HeldOutPrompt
    from dpkd.evaluate.inputs.eval_sets import EvalSet
    from dpkd.evaluate.inputs.models import Candidate
    from dpkd.evaluate.options.eval import EvalConfig


def rouge_l_evaluator(config: TrainConfig, max_new_tokens: int) -> EvaluateFn:
    """The function that measures `best_metric` rouge_l: greedy answers to held-out prompts, scored as `dpkd eval` does.

    It runs in the trainer's own process and returns the mean over the prompts, 0 to 100. `max_new_tokens` is the limit
    of the cache: responses to compare with are no longer.
    """
    from dpkd.evaluate.metrics.rouge import rouge
    from dpkd.teacher_cache.engines.engine import EngineOptions, GenerateRequest, Sampling, results_only
    from dpkd.teacher_cache.engines.open import open_engine

    def evaluate(student_dir: Path, prompts: Sequence[HeldOutPrompt]) -> float:
        student = locate_model(str(student_dir), "student")
        longest = max(len(prompt.prompt_ids) for prompt in prompts)
        free = max_new_tokens if student.max_positions is None else student.max_positions - longest
        new_tokens = min(max_new_tokens, free)
        sampling = Sampling(0.0, 1.0, new_tokens, tuple(student.stop_token_ids()))
        options = EngineOptions(max_length=longest + new_tokens, top_k=0, dtype=config.dtype, device=config.device)
        requests = [GenerateRequest(index, prompt.prompt_ids, seed=0) for index, prompt in enumerate(prompts)]
        scores = []
        with open_engine("transformers", student, options) as engine:
            for result in results_only(engine.generate(iter(requests), sampling)):
                answer = student.decode([int(token) for token in result.response_ids])
                scores.append(rouge(answer, prompts[result.index].references).rouge_l)
        return sum(scores) / len(scores)

    return evaluate


def find_contamination(location: str, candidates: Sequence[Candidate], eval_sets: Sequence[EvalSet]) -> dict[str, Any]:
    """`cache`: the fingerprint of the cache at `location`; `rows`: by set, the ids of the rows whose prompt is in it.

    Prompts are compared as texts in the cache's own template. Every shard's checksum is verified on the way. Raises
    `UserError` for a cache that cannot be read, and for one whose template the first model's tokenizer does not make.
    """
    from dpkd.teacher_cache.store.reader import TeacherCache

    cache = TeacherCache.open(location)
    template = cache.identities["template"]
    encoder = PromptEncoder(candidates[0].source.tokenizer, template["name"], template.get("args"))
    if encoder.identity() != template:
        raise UserError(
            "the cache was written with another prompt template, so its prompts cannot be compared",
            found=f"{template['name']} (sha256 {template['sha256'][:12]})",
            expected=f"sha256 {encoder.identity()['sha256'][:12]} of {candidates[0].source.name}",
            where=cache.folder,
            advice="Give a model with the cache's tokenizer first, or leave out --cache",
        )
    cached: set[str] = set()
    for _, shard in cache.scan(cache.manifest.shards):
        cached.update(shard.texts(index)[0] for index in range(len(shard)))
    rows = {
        eval_set.name: [example.example_id for example in eval_set.examples if encoder.prompt(example).text in cached]
        for eval_set in eval_sets
    }
    for name, ids in rows.items():
        if ids:
            say(f"data {name}: {len(ids)} prompts are also in the cache {location} (report.json lists them)")
    return {"cache": cache.fingerprint, "rows": rows}


def divergence_from_teacher(candidate: Candidate, config: EvalConfig) -> dict[str, list[float]] | None:
    """Values of each of at most `config.cache_rows` rows of `config.cache`, as `row_measures` names them.

    None, with the reason on standard error, where they are not defined. Raises `UserError` for a model whose logits are
    not its LM head applied to its hidden states, or are NaN.
    """
    from dpkd.core.devices import choose_device
    from dpkd.distill.student.measures import check_same_prompts, row_measures
    from dpkd.teacher_cache.store.reader import TeacherCache

    assert config.cache is not None  # evaluate asks only with a cache
    cache = TeacherCache.open(config.cache)
    try:
        if cache.top_k == 0:
            raise UserError("the cache keeps no distributions", where=cache.folder)
        check_same_prompts(candidate.source, cache)
    except UserError as reason:
        say(f"model {candidate.name}: no divergence from the cache's teacher: {reason}")
        return None
    model = candidate.source.load(config.dtype)
    try:
        values = row_measures(candidate.source, model, cache, config.cache_rows, choose_device(config.device))
    except UserError as error:
        raise UserError(f"{error}. To skip this measurement, give --cache-rows 0") from None
    return {name: values_N.tolist() for name, values_N in values.items()}
