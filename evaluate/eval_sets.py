"""The rows to evaluate: one set of examples for every model, and each row left out named by line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpkd.evaluate.candidates import Candidate
from dpkd.evaluate.config import EvalConfig
from dpkd.teacher_cache.errors import UserError
from dpkd.teacher_cache.examples import Example, SkippedRow, iter_examples, open_examples
from dpkd.teacher_cache.progress import say
from dpkd.teacher_cache.templates import EncodedPrompt, TemplateMismatchError

_NUM_SAID = 3


@dataclass(frozen=True)
class EvalSet:
    """One data set: `examples` in file order, `prompts[model][i]` the prompt of `examples[i]` for a model."""

    name: str
    identity: dict[str, str]
    examples: list[Example]
    prompts: dict[str, list[EncodedPrompt]]
    skipped: list[SkippedRow]


def read_eval_sets(config: EvalConfig, candidates: Sequence[Candidate]) -> list[EvalSet]:
    """The data sets of `config`, in its order, with prompts encoded by every candidate's own tokenizer.

    A row that one model cannot take is left out for all, so that means over a set compare like with like.
    Raises `UserError` for a file that is missing or malformed, and for a set of which no row is left.
    """
    sets = [_read_eval_set(name, path, config, candidates) for name, path in config.data.items()]
    for eval_set in sets:
        _say_skipped(eval_set)
        if not eval_set.examples:
            first = eval_set.skipped[0]
            raise UserError(
                f"no row of data {eval_set.name} can be evaluated",
                found=f"line {first.line}: {first.reason}",
                where=config.data[eval_set.name],
                advice="Give rows with a reference (`output`) and prompts within --max-prompt-tokens",
            )
    return sets


def _read_eval_set(name: str, path: str, config: EvalConfig, candidates: Sequence[Candidate]) -> EvalSet:
    source = open_examples(path)
    examples: list[Example] = []
    prompts: dict[str, list[EncodedPrompt]] = {candidate.name: [] for candidate in candidates}
    skipped: list[SkippedRow] = []
    for item in iter_examples(source, config.limit):
        encoded = item if isinstance(item, SkippedRow) else _encode(item, config.max_prompt_tokens, candidates)
        if isinstance(encoded, SkippedRow):
            skipped.append(encoded)
            continue
        assert isinstance(item, Example)
        examples.append(item)
        for candidate, prompt in zip(candidates, encoded, strict=True):
            prompts[candidate.name].append(prompt)
    return EvalSet(name, source.identity, examples, prompts, skipped)


def _encode(
    example: Example, max_prompt_tokens: int, candidates: Sequence[Candidate]
) -> list[EncodedPrompt] | SkippedRow:
    if not example.references:
        return SkippedRow(example.line, "no reference to score against")
    prompts = []
    for candidate in candidates:
        try:
            prompt = candidate.encoder.prompt(example)
        except TemplateMismatchError as error:
            return SkippedRow(example.line, str(error))
        if len(prompt.ids) > max_prompt_tokens:
            return SkippedRow(
                example.line,
                f"prompt of {len(prompt.ids)} tokens for model {candidate.name}, over {max_prompt_tokens}",
            )
        prompts.append(prompt)
    return prompts


def _say_skipped(eval_set: EvalSet) -> None:
    if not eval_set.skipped:
        return
    say(f"data {eval_set.name}: {len(eval_set.examples)} rows evaluated, {len(eval_set.skipped)} left out:")
    for row in eval_set.skipped[:_NUM_SAID]:
        say(f"  line {row.line}: {row.reason}")
    if len(eval_set.skipped) > _NUM_SAID:
        say(f"  and {len(eval_set.skipped) - _NUM_SAID} more; all are in report.json under `skipped`")
