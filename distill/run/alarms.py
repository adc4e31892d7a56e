"""Alarms: what the validations of a run say against it, in words, each once.

All figures are those of the validation log. Entropies and KL are in nats a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.row import RowSource, indices_of

ALARMS_LOG = "alarms.jsonl"

#: share of the KL before training by which it may rise, and nats that are noise whatever it was
_KL_SHARE, _KL_NOISE = 0.02, 0.01
#: nats by which an entropy must have risen, and by which it must exceed what the distance from the teacher explains
_ENTROPY_RISE, _ENTROPY_EXCESS = 0.5, 1.0
#: share of its start and of the teacher's entropy below which an entropy has run down, and the least nats below
_ENTROPY_SHARE, _ENTROPY_FALL = 0.5, 0.1
#: nats by which log q - log p at the ends of responses must have fallen, and by which it must be below 0
_END_FALL = 3.0
#: nats a token by which both sides of the pairs must have fallen
_FALL = 0.1
#: share of the gradient below which a preference hardly changes the student
_SMALL_SHARE = 0.05


@dataclass(frozen=True)
class Alarm:
    """Something that goes wrong in a run: its name, a sentence with figures and what to do, and the figures."""

    name: str
    text: str
    figures: dict[str, float]


@dataclass(frozen=True)
class Watch:
    """What the figures of a run are judged by.

    Attributes:
        beta: of the preference; rewards are divided by it.
        pairs: what a preference compares: the responses of a fixed round, single tokens, or nothing that stays the
            same from one validation to the next.
        teacher_entropy: a lower and an upper bound of the teacher's mean entropy on the validation rows; None where
            the cache has no distributions.
    """

    beta: float = 1.0
    pairs: str | None = None
    teacher_entropy: tuple[float, float] | None = None

    @classmethod
    def of(cls, config: TrainConfig, rows: RowSource, vocab_size: int) -> Watch:
        """The watch of a run that is validated on `rows`."""
        pairs = None
        if config.needs_pairs and config.student_samples != "live":
            pairs = "round"
        elif "dpkd" in config.weights and not config.needs_pairs and config.token_pairs != "all":
            pairs = "tokens"
        return cls(config.beta, pairs, teacher_entropy(rows, vocab_size))


@dataclass
class Alarms:
    """The alarms of a run: `start` is its first validation, `names` are those that were given.

    It is JSON and goes into checkpoints, so that a resumed run repeats no alarm.
    """

    start: dict[str, Any] | None = None
    names: list[str] = field(default_factory=list)
    largest_share: float = 0.0  # a preference that has done its work is small too

    def note(self, line: dict[str, Any], watch: Watch) -> list[Alarm]:
        """The alarms that a validation is the first to give."""
        if self.start is None:
            self.start = line
        if (share := line.get("preference_share")) is not None:
            self.largest_share = max(share, self.largest_share)
            line = line | {"preference_share": self.largest_share}
        new = [alarm for alarm in find_alarms(self.start, line, watch) if alarm.name not in self.names]
        self.names += [alarm.name for alarm in new]
        return new


def find_alarms(start: dict[str, Any], line: dict[str, Any], watch: Watch) -> list[Alarm]:
    """What the validation `line` says against a run whose first validation was `start`."""
    rules = (_kl_worse, _entropy_rises, _entropy_falls, _end_unlearned, _both_fall, _round_used_up, _small_preference)
    return [alarm for rule in rules if (alarm := rule(start, line, watch)) is not None]


def _kl_worse(start: dict[str, Any], line: dict[str, Any], _: Watch) -> Alarm | None:
    before, now = start.get("kld"), line.get("kld")
    if before is None or now is None or now <= before * (1 + _KL_SHARE) + _KL_NOISE:
        return None
    text = (
        f"the student is further from the teacher than before training: KL {before:.2f} -> {now:.2f}. Lower "
        "--learning-rate, or see 'Where each objective ends' in docs/objectives.md"
    )
    return Alarm("kl-worse", text, {"kld_start": before, "kld": now})


def _entropy_rises(start: dict[str, Any], line: dict[str, Any], watch: Watch) -> Alarm | None:
    before, now, kld = start.get("entropy"), line.get("entropy"), line.get("kld")
    if before is None or now is None or kld is None or watch.teacher_entropy is None:
        return None
    # where the student is unsure because it is far from the teacher, its entropy is the cross-entropy of the two
    explained = watch.teacher_entropy[1] + kld
    if now <= before + _ENTROPY_RISE or now <= explained + _ENTROPY_EXCESS:
        return None
    text = (
        f"the student's entropy runs up: {before:.1f} -> {now:.1f} nats, where its distance from the teacher explains "
        f"{explained:.1f}. Its distribution flattens: add --kd-weight or --sft-weight, or choose another objective"
    )
    return Alarm("entropy-rises", text, {"entropy_start": before, "entropy": now, "entropy_explained": explained})


def _entropy_falls(start: dict[str, Any], line: dict[str, Any], watch: Watch) -> Alarm | None:
    before, now = start.get("entropy"), line.get("entropy")
    if before is None or now is None or watch.teacher_entropy is None:
        return None
    teachers = watch.teacher_entropy[0]
    if now >= _ENTROPY_SHARE * min(before, teachers) or now > teachers - _ENTROPY_FALL:
        return None
    text = (
        f"the student's entropy runs down: {before:.2f} -> {now:.2f} nats, where the teacher's is {teachers:.2f} or "
        "more. It is surer than the teacher and repeats itself: train for fewer steps, or add --kd-weight"
    )
    return Alarm("entropy-falls", text, {"entropy_start": before, "entropy": now, "teacher_entropy": teachers})


def _end_unlearned(start: dict[str, Any], line: dict[str, Any], _: Watch) -> Alarm | None:
    before, now = start.get("end_gap"), line.get("end_gap")
    if before is None or now is None or now > min(before, 0.0) - _END_FALL:
        return None
    text = (
        "the student unlearns to end its answers: log q - log p at the ends of held-out responses "
        f"{before:.1f} -> {now:.1f} nats. They will run to the token limit. Start from a student that writes already "
        "(train it with --objective forward-kl first), or lower --learning-rate"
    )
    return Alarm("end-unlearned", text, {"end_gap_start": before, "end_gap": now})


def _both_fall(start: dict[str, Any], line: dict[str, Any], watch: Watch) -> Alarm | None:
    falls = {}
    for side in ("chosen", "rejected"):
        before, now = (_nats_a_token(part, side, watch) for part in (start, line))
        if before is None or now is None or now >= before - _FALL:
            return None
        falls[f"{side}_fall"] = before - now
    what = "responses" if watch.pairs == "round" else "tokens"
    text = (
        f"log q of the chosen and of the rejected {what} both fall, by {falls['chosen_fall']:.2f} and "
        f"{falls['rejected_fall']:.2f} nats a token: the margin is won by unlearning (reward hacking). Add --kd-weight "
        "or --sft-weight"
    )
    return Alarm("both-fall", text, falls)


def _nats_a_token(line: dict[str, Any], side: str, watch: Watch) -> float | None:
    """Mean log q/p of a token of one side; None where it is not measured on the same text every time."""
    if watch.pairs == "tokens":
        reward = line.get(f"reward_{side}")
        return None if reward is None else reward / watch.beta
    total, length = line.get(f"reward_{side}_sum"), line.get(f"{side}_length")
    return None if watch.pairs is None or total is None or not length else total / length / watch.beta


def _round_used_up(start: dict[str, Any], line: dict[str, Any], watch: Watch) -> Alarm | None:
    before, now = start.get("reward_margin"), line.get("reward_margin")
    if watch.pairs != "round" or before is None or now is None or now < 0:
        return None
    text = (
        f"the round is used up: the margin on held-out pairs went from {before:.2f} to {now:.2f}, and 0 is where the "
        "student prefers as the teacher does. More steps overshoot: draw a new round"
    )
    return Alarm("round-used-up", text, {"reward_margin_start": before, "reward_margin": now})


def _small_preference(_: dict[str, Any], line: dict[str, Any], __: Watch) -> Alarm | None:
    share = line.get("preference_share")
    if share is None or share >= _SMALL_SHARE:
        return None
    text = (
        f"the preference is {share:.1%} of the gradient, the other terms are the rest: it hardly changes the student. "
        "Raise --dpkd-weight or --beta, or leave the preference out"
    )
    return Alarm("small-preference", text, {"preference_share": share})


def teacher_entropy(rows: RowSource, vocab_size: int) -> tuple[float, float] | None:
    """Bounds of the teacher's mean entropy at the positions of chosen responses, from the cached distributions (nats).

    The tail is one outcome in the lower bound and evenly spread in the upper one. None without distributions.
    """
    lower = spread = 0.0
    count = 0
    for index in indices_of(rows):
        found = rows.row(*index).chosen.distributions
        if found is None:
            return None
        log_p_E, log_tail_T = found.logprobs_E.astype(np.float64), found.log_tail_T.astype(np.float64)
        tail_T, others_T = np.exp(log_tail_T), np.maximum(vocab_size - found.counts_T, 1)
        inside_T = tail_T > 0
        lower -= float((np.exp(log_p_E) * log_p_E).sum() + (tail_T * log_tail_T)[inside_T].sum())
        spread += float((tail_T * np.log(others_T))[inside_T].sum())
        count += len(tail_T)
    return (lower / count, (lower + spread) / count) if count else None
