"""Rouge-L of a student while it trains: greedy answers to held-out prompts, scored as `dpkd eval` scores them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpkd.core.models import locate_model
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.run.best import EvaluateFn, HeldOutPrompt
from dpkd.evaluate.metrics.exact_match import rouge_l
from dpkd.teacher_cache.engines.engine import EngineOptions, GenerateRequest, Sampling, open_engine, results_only


def rouge_l_of(config: TrainConfig) -> EvaluateFn:
    """The function that `train` measures `best_metric` rouge_l with; it runs in the trainer's own process."""

    def evaluate(student_dir: Path, prompts: Sequence[HeldOutPrompt]) -> float:
        student = locate_model(str(student_dir), "student")
        longest = max(len(prompt.prompt_ids) for prompt in prompts)
        room = config.max_new_tokens if student.max_positions is None else student.max_positions - longest
        new_tokens = min(config.max_new_tokens, room)
        sampling = Sampling(0.0, 1.0, new_tokens, tuple(student.stop_token_ids()))
        options = EngineOptions(max_length=longest + new_tokens, top_k=0, dtype=config.dtype, device=config.device)
        requests = [GenerateRequest(index, prompt.prompt_ids, seed=0) for index, prompt in enumerate(prompts)]
        scores = []
        with open_engine("transformers", student, options) as engine:
            for result in results_only(engine.generate(iter(requests), sampling)):
                answer = student.decode([int(token) for token in result.response_ids])
                scores.append(rouge_l(answer, prompts[result.index].references))
        return sum(scores) / len(scores)

    return evaluate
