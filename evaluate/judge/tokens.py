"""What a judge costs: tokens used as the server counted them, and an estimate of those to come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpkd.evaluate.judge.rows import Question
from dpkd.evaluate.judge.verdicts import Answered
from dpkd.evaluate.options.judge import JudgeConfig

# English prose in tokenizers of 30,000 to 200,000 entries has 4 to 5; the lower end, so that the estimate is not low
_CHARACTERS_A_TOKEN = 4.0


def count_tokens(config: JudgeConfig, answered: Sequence[Answered]) -> dict[str, Any]:
    """Requests, tokens and, where both prices are given, the cost of `answered`.

    Tokens are those of the server's `usage`; replies without it are counted and add nothing.
    """
    replies = [reply for found in answered for reply in found.replies]
    counted = [reply for reply in replies if reply.prompt_tokens is not None and reply.completion_tokens is not None]
    prompt = sum(reply.prompt_tokens or 0 for reply in counted)
    completion = sum(reply.completion_tokens or 0 for reply in counted)
    return {
        "num_requests": len(replies),
        "num_without_usage": len(replies) - len(counted),
        "prompt": prompt,
        "completion": completion,
        "cost": _cost(config, prompt, completion),
    }


def estimate_tokens(
    config: JudgeConfig,
    questions: Sequence[Question],
    missing: Sequence[Question],
    answered: Mapping[str, Answered],
) -> dict[str, Any]:
    """What the `missing` ones of `questions` will take.

    Where some are answered, by their tokens a character and a reply; else by 4 characters a token, and the longest
    reply. A second request for an unreadable reply is not foreseen before there are replies.
    """
    there = {q.key: q for q in questions if q.key in answered}
    sizes = [
        (len(there[key].text()), reply.prompt_tokens, reply.completion_tokens)
        for key in there
        for reply in answered[key].replies
        if reply.prompt_tokens is not None and reply.completion_tokens is not None
    ]
    measured = bool(sizes)
    if measured:
        tokens_a_character = sum(prompt for _, prompt, _ in sizes) / sum(length for length, _, _ in sizes)
        replies_a_question = len(sizes) / len(there)
        completion_tokens = sum(completion for _, _, completion in sizes) / len(sizes)
    else:
        tokens_a_character, replies_a_question = 1 / _CHARACTERS_A_TOKEN, 1.0
        completion_tokens = float(config.max_tokens)
    prompt = round(sum(len(question.text()) for question in missing) * tokens_a_character * replies_a_question)
    completion = round(len(missing) * completion_tokens * replies_a_question)
    return {
        "num_questions": len({question.key for question in questions}),
        "num_missing": len(missing),
        "prompt": prompt,
        "completion": completion,
        "measured": measured,
        "cost": _cost(config, prompt, completion),
    }


def estimate_text(found: Mapping[str, Any]) -> str:
    """The estimate in lines for the terminal."""
    basis = (
        "from the replies that are there"
        if found["measured"]
        else "4 characters a token, and replies as long as --max-tokens allows"
    )
    cost = "" if found["cost"] is None else f"\ncost: about {found['cost']:.2f}"
    return (
        f"questions: {found['num_questions']}, of which {found['num_missing']} are to be asked\n"
        f"tokens: about {found['prompt']} of prompts and {found['completion']} of replies ({basis}){cost}"
    )


def _cost(config: JudgeConfig, prompt: int, completion: int) -> float | None:
    if config.prompt_price is None or config.completion_price is None:
        return None
    return (prompt * config.prompt_price + completion * config.completion_price) / 1e6
