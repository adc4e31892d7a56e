"""The cost of a judge: tokens used, as counted by the server, and an estimate of the tokens still needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpkd.evaluate.judge.rows import Question
from dpkd.evaluate.judge.verdicts import Answered
from dpkd.evaluate.options.judge import JudgeConfig

# English prose has 4 to 5 with vocabularies of 30,000 to 200,000; the lower value, so that the estimate is not low
_CHARACTERS_PER_TOKEN = 4.0


def count_tokens(config: JudgeConfig, answered: Sequence[Answered]) -> dict[str, Any]:
    """Requests, tokens and, if both prices are given, the cost of `answered`.

    Tokens are those of the server's `usage`; replies without it are only counted.
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
        "cost": config.cost(prompt, completion),
    }


def estimate_tokens(
    config: JudgeConfig, questions: Sequence[Question], missing: Sequence[Question], answered: Mapping[str, Answered]
) -> dict[str, Any]:
    """An estimate for the `missing` ones of `questions`.

    If some are answered, from their tokens per character and per reply; else from 4 characters per token and the
    longest reply, without second requests for unreadable replies.
    """
    known = {q.key: q for q in questions if q.key in answered}
    sizes = [
        (len(known[key].text()), reply.prompt_tokens, reply.completion_tokens)
        for key in known
        for reply in answered[key].replies
        if reply.prompt_tokens is not None and reply.completion_tokens is not None
    ]
    measured = bool(sizes)
    if measured:
        tokens_per_character = sum(prompt for _, prompt, _ in sizes) / sum(length for length, _, _ in sizes)
        replies_per_question = len(sizes) / len(known)
        completion_tokens = sum(completion for _, _, completion in sizes) / len(sizes)
    else:
        tokens_per_character, replies_per_question = 1 / _CHARACTERS_PER_TOKEN, 1.0
        completion_tokens = float(config.max_tokens)
    prompt = round(sum(len(question.text()) for question in missing) * tokens_per_character * replies_per_question)
    completion = round(len(missing) * completion_tokens * replies_per_question)
    return {
        "num_questions": len({question.key for question in questions}),
        "num_missing": len(missing),
        "prompt": prompt,
        "completion": completion,
        "measured": measured,
        "cost": config.cost(prompt, completion),
    }


def estimate_text(found: Mapping[str, Any]) -> str:
    """The estimate as lines for the terminal."""
    basis = (
        "from the replies so far"
        if found["measured"]
        else "4 characters per token, and replies as long as --max-tokens allows"
    )
    cost = "" if found["cost"] is None else f"\ncost: about {found['cost']:.2f}"
    return (
        f"questions: {found['num_questions']}, {found['num_missing']} of them still to ask\n"
        f"tokens: about {found['prompt']} of prompts and {found['completion']} of replies ({basis}){cost}"
    )
