"""The terms that a config weighs.

A new divergence or preference form is a row of the table in `losses.divergence` or `losses.preference`. Any other term
is a class in one of the modules below, and a name in `make_terms`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dpkd.distill.losses.divergence import DIVERGENCES, cross_entropy_to, forward_kl
from dpkd.distill.losses.preference import PreferenceOptions
from dpkd.distill.objectives.preference_terms import AllPairs, ArgmaxPairs, DrawnPairs, SequencePreference
from dpkd.distill.objectives.sample_terms import Contrast, PolicyGradient
from dpkd.distill.objectives.statistics import Outcomes
from dpkd.distill.objectives.term import CrossEntropy, Divergence, Term
from dpkd.distill.options.train import TrainConfig


def make_terms(config: TrainConfig, vocab_size: int) -> dict[str, Term]:
    """The terms that `config` weighs, by name; `vocab_size` is the number of ids that teacher and student share."""
    outcomes = Outcomes(config.tail, vocab_size)
    options = PreferenceOptions(
        beta=config.beta,
        gamma=config.gamma,
        dpop_lambda=config.dpop_lambda,
        label_smoothing=config.smoothing,
        length_normalize=config.length_normalize,
        teacher_floor=config.teacher_floor,
    )

    def preference() -> Term:
        if config.needs_pairs:
            return SequencePreference(form=config.objective, options=options, offset=config.offset)
        if config.token_pairs == "all":
            return AllPairs(options=options, skew=config.skew, outcomes=outcomes)
        if config.token_pairs == "drawn":
            return DrawnPairs(form=config.objective, options=options, outcomes=outcomes)
        return ArgmaxPairs(form=config.objective, options=options, vocab_size=vocab_size)

    def divergence() -> Term:
        if config.objective == "distillm2":
            return Contrast(
                outcomes=outcomes,
                alpha=config.skew,
                anchors=(config.skew_anchor_chosen, config.skew_anchor_rejected),
                schedule=config.skew_schedule,
            )
        # with another objective than a divergence, the `kd` term is the forward KL; of `kd`, the cross-entropy H(p, q)
        function: Callable[[Tensor, Tensor], Tensor] = forward_kl
        if config.objective == "kd":
            function = cross_entropy_to
        elif config.objective in DIVERGENCES:
            function = DIVERGENCES[config.objective].bind(config)
        softened = Outcomes(config.tail, vocab_size, config.kd_temperature)
        return Divergence(divergence=function, outcomes=softened)

    makers: dict[str, Callable[[], Term]] = {
        "dpkd": preference,
        "sft": CrossEntropy,
        "kd": divergence,
        "lm": lambda: CrossEntropy("corpus"),
        "minillm": lambda: PolicyGradient(
            vocab_size=vocab_size, clip=config.minillm_clip, length_normalize=config.length_normalize
        ),
    }
    return {name: makers[name]() for name in config.weights}
