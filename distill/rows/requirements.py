"""What an objective needs of a cache and of a round: distributions, how likely tokens were, samples of a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dpkd.core.errors import UserError
from dpkd.distill.options.train import TrainConfig
from dpkd.distill.rows.columns import read_keys
from dpkd.teacher_cache.store.reader import CacheReader, Round
from dpkd.teacher_cache.store.shards import ShardRecord

#: outcomes of a position whose pairs fit into memory
_MOST_OUTCOMES = 2**12


def top_k_of(cache: CacheReader, student_round: Round | None, config: TrainConfig) -> int:
    """Most entries a position of the responses to learn from: of the round's, of the cache's, or the fewer of both."""
    if student_round is None or config.needs_pairs:
        return cache.top_k
    of_round = int(student_round.manifest.identities["logprobs"]["top_k"])
    return of_round if config.mix is None else min(of_round, cache.top_k)


def check_distributions(cache: CacheReader, student_round: Round | None, config: TrainConfig) -> None:
    """Raise `UserError` when the objective needs distributions and its responses have none, or fewer than `top_k`."""
    most = top_k_of(cache, student_round, config)
    if config.top_k is not None and config.top_k > most:
        raise UserError(
            "top_k is more than the cache keeps",
            found=f"top_k {config.top_k}",
            expected=f"at most {most}",
            where=cache.folder,
            advice="Lower --top-k, or leave it out",
        )
    by_pairs = config.objective == "dpkd" and config.level == "token" and config.token_pairs == "all"
    if by_pairs and config.tail == "uniform" and cache.vocab_size > _MOST_OUTCOMES:
        raise UserError(
            "--tail uniform makes every token an outcome, and all pairs of them are too many",
            found=f"{cache.vocab_size} tokens",
            expected=f"at most {_MOST_OUTCOMES}",
            where=cache.folder,
            advice="Leave --tail out, or give --objective jeffreys, which has the same optimum",
        )
    if config.tail == "uniform" and len(cache.vocab_sizes) > 1:
        raise UserError(
            "--tail uniform spreads the tail over a teacher's tokens, and the teachers differ in their number",
            found=" and ".join(map(str, cache.vocab_sizes)),
            where=cache.folder,
            advice="Leave --tail out",
        )
    if config.needs_distributions and most == 0:
        source = "cache" if student_round is None or config.needs_pairs or cache.top_k == 0 else "round"
        what = f"the {source} has no distributions, which --objective {config.objective} --level {config.level} needs"
        raise no_distributions(what, cache, "train with --level sequence or --objective sft")

    check_known(cache, student_round, config)
    if student_round is not None and config.contrasts and not student_round.manifest.identities["logprobs"]["top_k"]:
        what = f"the round has no distributions, which --objective {config.objective} needs on both responses"
        raise no_distributions(what, cache, "train with --level sequence", "Build the round")
    if student_round is not None and config.needs_sampling_logprobs:
        _check_sampling(cache, student_round, config)


def check_known(cache: CacheReader, student_round: Round | None, config: TrainConfig) -> None:
    """Raise `UserError` when the objective needs what the cache records as unknown."""
    logprobs = cache.identities["logprobs"]
    if config.needs_pairs and not config.contrasts and "unknown" in (logprobs.get("responses"), logprobs.get("end")):
        raise UserError(
            "the cache does not know how likely whole responses are, which --level sequence needs",
            found="texts alone" if logprobs.get("responses") == "unknown" else "responses whose end has no log-prob",
            expected="log-probs of every token",
            where=cache.folder,
            advice="Train with --objective seqkd, or build a cache with --engine vllm or transformers",
        )
    learns_from_cache = student_round is None or config.needs_pairs or config.mix is not None
    if logprobs.get("end") == "unknown" and learns_from_cache and not config.weights.get("sft"):
        raise UserError(
            "the endpoint of the cache did not say how likely the end of a response is, so a student of "
            f"--objective {config.objective} alone never learns to stop",
            found="no cross-entropy",
            expected="--sft-weight above 0",
            where=cache.folder,
            advice="Add --sft-weight 0.1, which learns the end as the teacher wrote it",
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
            "the round was drawn otherwise than the cache, and --offset compares their probabilities",
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
    keys = {key for record in shards for key in read_keys(cache.folder, record)}
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
