"""What an objective needs of a cache and of a round: distributions, how likely tokens were, samples of a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dpkd.core.errors import UserError
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.columns import read_each, read_keys
from dpkd.teacher_cache.store.reader import CacheReader, Round
from dpkd.teacher_cache.store.shards import ShardRecord

#: tokens of a position whose pairs fit into memory, beside the tail: `all_pairs_preference_loss` takes 270 MB for them
_MOST_PAIRED_TOKENS = 2**12


def top_k_of(cache: CacheReader, student_round: Round | None, config: TrainConfig) -> int:
    """Most entries a position of the responses to learn from: of the round's, of the cache's, or the fewer of both."""
    return min(int(logprobs["top_k"]) for logprobs in _read_of(cache, student_round, config).values())


def _read_of(cache: CacheReader, student_round: Round | None, config: TrainConfig) -> dict[str, dict[str, Any]]:
    """What cache and round record about their distributions, for those of the two whose distributions are read."""
    read: dict[str, dict[str, Any]] = {}
    if student_round is None or config.needs_pairs or config.mix is not None:
        read["cache"] = cache.identities["logprobs"]
    if student_round is not None and (config.contrasts or not config.needs_pairs):
        read["round"] = student_round.manifest.identities["logprobs"]
    return read


def check_distributions(cache: CacheReader, student_round: Round | None, config: TrainConfig) -> None:
    """Raise `UserError` when the objective needs distributions and its responses have none, or fewer than `top_k`."""
    read = _read_of(cache, student_round, config)
    lacking = [name for name, logprobs in read.items() if not logprobs["top_k"]]
    if config.needs_distributions and lacking:
        both = " on both responses" if config.contrasts else ""
        objective = f"--objective {config.objective}" + ("" if config.contrasts else f" --level {config.level}")
        what = f"the {lacking[0]} has no distributions, which {objective} needs{both}"
        otherwise = "--level sequence" if config.contrasts else "--level sequence or --objective sft"
        raise no_distributions(what, cache, f"train with {otherwise}", f"Build a {lacking[0]}")
    for name, logprobs in read.items():
        for key, given in (("top_k", config.top_k), ("top_mass", config.top_mass)):
            kept = logprobs.get(key)
            if given is not None and kept is not None and given > kept:
                raise UserError(
                    f"{key} is more than the {name} keeps",
                    found=f"{key} {given:g}",
                    expected=f"at most {kept:g}",
                    where=cache.folder,
                    advice=f"Lower {config.flag(key)}, or leave it out",
                )
    if config.objective == "dpkd" and config.level == "token" and config.token_pairs == "all":
        _check_pairs(cache, [int(logprobs["top_k"]) for logprobs in read.values()], config)
    if config.tail == "uniform" and len(cache.vocab_sizes) > 1:
        raise UserError(
            "--tail uniform spreads the tail over a teacher's tokens, and the teachers differ in their number",
            found=" and ".join(map(str, cache.vocab_sizes)),
            where=cache.folder,
            advice="Leave --tail out",
        )
    check_known(cache, student_round, config)
    if student_round is not None and config.needs_sampling_logprobs:
        _check_sampling(cache, student_round, config)


def _check_pairs(cache: CacheReader, top_ks: Sequence[int], config: TrainConfig) -> None:
    """Raise `UserError` where a position has too many outcomes to compare all pairs of them."""
    uniform = config.tail == "uniform"
    num_tokens = cache.vocab_size
    if not uniform:
        num_tokens = min(max(top_ks), config.top_k or num_tokens, num_tokens)
    if num_tokens > _MOST_PAIRED_TOKENS:
        what = "--tail uniform makes every token an outcome" if uniform else "every kept token is an outcome"
        fewer = "Leave --tail out" if uniform else f"Give --top-k {_MOST_PAIRED_TOKENS}"
        raise UserError(
            f"{what}, and all pairs of them are too many",
            found=f"{num_tokens} tokens",
            expected=f"at most {_MOST_PAIRED_TOKENS}",
            where=cache.folder,
            advice=f"{fewer}, or give --objective jeffreys, which has the same optimum",
        )


def check_known(cache: CacheReader, student_round: Round | None, config: TrainConfig) -> None:
    """Raise `UserError` when the objective needs what the cache records as unknown."""
    logprobs = cache.identities["logprobs"]
    responses_known = logprobs.get("responses") != "unknown"
    if config.needs_pairs and not config.contrasts and not (responses_known and cache.ends_known):
        raise UserError(
            "the cache does not know how likely whole responses are, which --level sequence needs",
            found="responses whose end has no log-prob" if responses_known else "texts alone",
            expected="log-probs of every token",
            where=cache.folder,
            advice="Train with --objective seqkd, or build a cache with --engine vllm or transformers",
        )
    learns_from_cache = student_round is None or config.needs_pairs or config.mix is not None
    by_argmax = config.compares_tokens and config.token_pairs == "argmax"
    if not cache.ends_known and learns_from_cache and (config.tail == "uniform" or by_argmax):
        raise UserError(
            "the endpoint of the cache did not say how likely the end of a response is: no token is known there, and "
            "the student would unlearn the end",
            found="--token-pairs argmax" if by_argmax else "--tail uniform",
            expected="--token-pairs all or drawn, and --tail bucket or renormalise",
            where=cache.folder,
            advice="Leave it out" if by_argmax else "Leave --tail out",
        )
    if not cache.ends_known and learns_from_cache and not config.weights.get("sft"):
        raise UserError(
            "the endpoint of the cache did not say how likely the end of a response is, so a student of "
            f"--objective {config.objective} alone never learns to stop",
            found="no cross-entropy",
            expected="--sft-weight above 0",
            where=cache.folder,
            advice="Add --sft-weight 0.1, which learns the end as the teacher wrote it",
        )
    if logprobs.get("remainder") == "unknown" and by_argmax:
        raise UserError(
            "the cache does not know the tail mass, and a student's likeliest token may be in the tail",
            found="--token-pairs argmax",
            expected="--token-pairs all or drawn, with --tail renormalise",
            where=cache.folder,
            advice="Leave --token-pairs out and give --tail renormalise, which compares the kept tokens alone",
        )
    if logprobs.get("remainder") == "unknown" and config.needs_distributions and config.tail != "renormalise":
        raise UserError(
            "the cache does not know the tail mass, the probability of the tokens that it does not keep",
            found=f"--tail {config.tail}",
            expected="--tail renormalise",
            where=cache.folder,
            advice="Give --tail renormalise, which compares the kept tokens alone",
        )


def _check_sampling(cache: CacheReader, student_round: Round, config: TrainConfig) -> None:
    """Raise `UserError` unless the round has the log q0 that the objective needs, drawn from q0 as it is."""
    needing = "--offset" if config.offset else f"--objective {config.objective}"
    extra = " --score-cached" if config.offset else ""
    advice = f"Build another --round with `dpkd cache-teacher --temperature 1 --top-p 1{extra}`"
    if not student_round.has_sampling_logprobs:
        raise UserError(
            f"the round does not say how likely its tokens were, which {needing} needs",
            found=f"format {student_round.manifest.format_version}",
            expected="format 2",
            where=student_round.folder,
            advice=advice,
        )
    generation = student_round.manifest.identities["generation"]
    if (generation["temperature"], generation["top_p"]) != (1, 1):
        raise UserError(
            f"the round was not drawn from the student's own distribution, which {needing} needs",
            found=f"temperature {generation['temperature']}, top_p {generation['top_p']}",
            expected="temperature 1, top_p 1",
            where=student_round.folder,
            advice=advice,
        )
    if config.offset and not generation.get("score_cached"):
        raise UserError(
            "the round has no scores of the cache's responses, which --offset needs",
            found="a round without --score-cached",
            where=student_round.folder,
            advice=advice,
        )
    keys = ("temperature", "top_p", "max_new_tokens")
    ours, theirs = ({key: made[key] for key in keys} for made in (cache.identities["generation"], generation))
    if config.offset and ours != theirs:
        raise UserError(
            "the round was drawn with other settings than the cache, and --offset compares their probabilities",
            found=str(theirs),
            expected=str(ours),
            where=student_round.folder,
            advice="Build cache and round at temperature 1 and top-p 1, with the same --max-new-tokens",
        )


def check_samples(cache: CacheReader, shards: Sequence[ShardRecord], config: TrainConfig) -> None:
    """Raise `UserError` where `num_student_samples` live responses to a prompt would never be drawn.

    `index` draws one for each sample number that the cache has of a prompt. Reads these once, where more than one
    response is asked for.
    """
    if config.pairing != "index" or config.num_student_samples == 1:
        return
    keys = {key for of_shard in read_each(read_keys, cache.folder, shards) for key in of_shard}
    most = max(Counter(example_id for example_id, _ in keys).values())
    if config.num_student_samples > most:
        loss = "with --pairing index" if config.needs_pairs else "without pairs of responses"
        other = "give --pairing all or best-vs-worst, " if config.needs_pairs else ""
        raise UserError(
            f"{loss}, training draws no more live responses to a prompt than the cache has samples of it",
            found=f"--num-student-samples {config.num_student_samples}",
            expected=f"at most {most}",
            where=cache.folder,
            advice=f"Lower --num-student-samples, {other}or build a cache with a larger --num-samples",
        )


def no_distributions(what: str, cache: CacheReader, otherwise: str, build: str = "Build a cache") -> UserError:
    advice = f"{build} with --top-k 64, or {otherwise}"
    return UserError(what, found="top-k 0", expected="top-k of 1 or more", where=cache.folder, advice=advice)
