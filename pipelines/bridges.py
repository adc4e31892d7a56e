"""What joins two packages that do not import each other: registered in pyproject.toml, called through `load_bridge`.

`distill` measures Rouge-L while it trains; `evaluate` compares prompts and models with a teacher cache; `teacher_cache`
trains a student to see what a K costs.
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
    from dpkd.teacher_cache.options.audit import FidelityConfig
    from dpkd.teacher_cache.store.reader import TeacherCache

_MOST_HELD_OUT = 64  # examples of a pilot: no more than `dpkd train` holds out by default


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


def pilot_of_k(config: FidelityConfig, cache: TeacherCache) -> dict[str, Any]:
    """What the number of entries costs a student: copies trained at several K, measured with all entries.

    Runs that differ in K alone have the same seed, so the same order of rows and the same held-out examples. Keys:
    `student`, `steps`, `seeds`, `held_out` (examples), `kl_before` (nats, mean over seeds), and `runs` by rising K:
    `top_k`; `kl`, KL(teacher || student) of each seed in nats per token; `kl_mean`, `kl_spread` (standard deviation);
    `over_mean`, `over_spread`, the same of its difference to the largest K. Raises `UserError` for a K that the cache
    does not have, and for a student that cannot learn from it.
    """
    import tempfile

    import numpy as np

    from dpkd.distill import TrainConfig, train
    from dpkd.distill.rows.held_out import cache_examples

    assert config.student is not None  # checked by the config
    most = cache.top_k
    ks = sorted(set(config.pilot_k or [k for k in (most // 16, most // 4, most) if k]))
    if not ks or ks[-1] > most:
        raise UserError(
            "the cache does not have so many entries per position",
            found=f"--pilot-k {ks[-1] if ks else 1}",
            expected=f"at most {most}",
            where=cache.folder,
            advice="Lower --pilot-k, or build a cache with a larger --top-k",
        )
    num = max(min(len(cache_examples(cache)) // 4, _MOST_HELD_OUT), 1)
    kl: dict[int, list[float]] = {k: [] for k in ks}
    before = []
    for seed in range(config.pilot_seeds):
        for k in ks:
            say(f"pilot: {config.student} at K = {k}, seed {seed}")
            with tempfile.TemporaryDirectory(prefix="dpkd-pilot-") as directory:
                chosen = {
                    "cache": str(cache.folder), "student": config.student, "out": Path(directory) / "run", "top_k": k,
                    "steps": config.pilot_steps, "learning_rate": config.pilot_learning_rate, "seed": seed,
                    "validation_examples": num, "validate_every": config.pilot_steps, "best_metric": "last",
                    "save_every": None, "tracker": "none", "device": config.device,
                }  # fmt: skip
                options = TrainConfig.parse(chosen, where="the pilot")
                if k == ks[0]:
                    before.append(_held_out_kl(config.student, cache, options))
                kl[k].append(_held_out_kl(str(train(options)), cache, options))
    largest = np.array(kl[ks[-1]])
    runs = []
    for k, values in kl.items():
        over = np.array(values) - largest
        means = {"kl_mean": np.mean(values), "kl_spread": np.std(values, ddof=1)}
        means |= {"over_mean": over.mean(), "over_spread": over.std(ddof=1)}
        runs.append({"top_k": k, "kl": values} | {name: float(value) for name, value in means.items()})
    facts = {"student": config.student, "steps": config.pilot_steps, "seeds": config.pilot_seeds, "held_out": num}
    return facts | {"kl_before": float(np.mean(before)), "runs": runs}


def _held_out_kl(model_dir: str, cache: TeacherCache, options: TrainConfig) -> float:
    """KL(teacher || student) in nats per token on what `options` holds out, with all entries of the cache."""
    from dpkd.core.devices import choose_device
    from dpkd.distill.rows.sources import open_cache_rows
    from dpkd.distill.student.measures import batch_measures, batches_of

    held_out = open_cache_rows(cache, None, options).validation
    assert held_out is not None  # `options` asks for some
    rows = [held_out.row(group, i) for group, size in enumerate(held_out.group_sizes) for i in range(size)]
    student, device = locate_model(model_dir, "student"), choose_device(options.device)
    model: Any = student.load("float32")
    values = batch_measures(student, model.to(device), batches_of(rows, device, with_distributions=True), len(rows))
    return float(values["kld"].sum() / values["tokens"].sum())
