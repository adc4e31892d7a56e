"""Which options of `dpkd train` go together; each rule says what to give instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpkd.distill.options.objectives import OBJECTIVE_TERMS, PREFERENCES, TOKEN_PREFERENCES

if TYPE_CHECKING:
    from dpkd.distill.options.train import TrainConfig


def check_train_options(config: TrainConfig) -> None:
    """Raise `ValueError` for options that contradict each other, or of which one is missing."""
    if config.steps is not None and config.epochs is not None:
        raise ValueError("give --steps or --epochs, not both")
    if config.data is not None and (config.objective != "sft" or config.cache is not None):
        raise ValueError("--data takes the place of --cache and goes with --objective sft alone")
    if config.data is None and config.cache is None:
        raise ValueError("--cache is needed (or --data with --objective sft)")
    if config.batch_tokens is not None and config.follow:
        raise ValueError("--batch-tokens needs a finished --cache: the lengths of all rows are looked at first")
    if config.follow and (config.cache is None or config.round is not None):
        raise ValueError("--follow takes a --cache, and no --round: a round needs a finished cache")
    _check_samples(config)
    _check_terms(config)
    _check_adapters(config)


def _check_adapters(config: TrainConfig) -> None:
    changed = {"lora_alpha", "lora_target_modules", "lora_save"} & config.model_fields_set
    if config.lora_rank is None and any(getattr(config, name) not in (None, (), "merged") for name in changed):
        raise ValueError(f"{', '.join(sorted(changed))} needs --lora-rank")
    if config.lora_rank is not None and config.student_samples == "live" and config.sampler == "vllm":
        raise ValueError("--lora-rank goes with --sampler transformers where responses are drawn live")


def _check_samples(config: TrainConfig) -> None:
    samples, paired = config.student_samples, config.needs_pairs
    if config.objective not in PREFERENCES and config.level == "sequence":
        raise ValueError(f"--level sequence goes with a preference ({', '.join(PREFERENCES)})")
    if config.objective in PREFERENCES and config.level == "token" and config.objective not in TOKEN_PREFERENCES:
        raise ValueError(f"--objective {config.objective} is a sequence loss: give --level sequence")
    if config.objective in ("sft", "seqkd") and (samples is not None or config.round is not None):
        raise ValueError(f"--objective {config.objective} takes no student samples and no --round")
    if config.objective == "seqkd" and config.responses == "reference":
        raise ValueError("--objective seqkd learns from the teacher's responses: leave --responses out")
    if paired and samples == "forced":
        raise ValueError("--level sequence takes --student-samples cached (with --round NAME) or live")
    if config.objective == "minillm" and samples not in ("cached", "live"):
        raise ValueError("--objective minillm takes --student-samples cached (with --round NAME) or live")
    if paired and samples != "live" and config.round is None:
        raise ValueError("--level sequence needs --round NAME, the student's responses in the cache")
    if config.share_prompt and not paired:
        raise ValueError("share_prompt goes with --level sequence: nothing else has two responses to a prompt")
    if samples == "cached" and config.round is None:
        raise ValueError("--student-samples cached needs --round NAME, the student's responses in the cache")
    if samples == "live" and config.round is not None:
        raise ValueError("give --round or --student-samples live, not both")
    if samples == "forced" and config.round is not None:
        raise ValueError("--student-samples forced takes no --round")
    if samples == "live" and not config.teacher_url:
        raise ValueError("--student-samples live needs --teacher-url http://HOST:PORT (see dpkd serve-teacher)")
    if samples == "live" and (config.follow or config.cache is None):
        raise ValueError("--student-samples live needs a finished --cache")
    if config.teacher_url and samples != "live":
        raise ValueError("--teacher-url goes with --student-samples live")
    if config.validation_examples and (config.cache is None or config.follow):
        raise ValueError("validation_examples needs a finished --cache")
    if config.best_metric is not None and not config.validation_examples:
        raise ValueError(f"best_metric {config.best_metric} needs validation_examples of 1 or more")
    if config.patience is not None and config.best_metric is None:
        raise ValueError("patience needs a best_metric")


def _check_terms(config: TrainConfig) -> None:
    own = OBJECTIVE_TERMS[config.objective]
    for name in ("dpkd", "minillm"):
        given = getattr(config, f"{name}_weight")
        if given is not None and name not in own:
            raise ValueError(f"{name}_weight goes with another objective than {config.objective}")
        if given == 0 and name in own:
            raise ValueError(f"{name}_weight 0 leaves nothing of --objective {config.objective}; use another one")
    if config.lm_weight and config.lm_data is None:
        raise ValueError("the language-model term needs --lm-data (or --set lm_weight=0)")
    if config.kd_weight and config.data is not None:
        raise ValueError("kd_weight needs a --cache with distributions")
    if not config.weights:
        raise ValueError("every weight is 0: nothing would be learnt")
    if config.label_smoothing and config.objective == "ipo":
        raise ValueError("label_smoothing goes with the logistic forms, not with ipo")
