"""The rows to evaluate: the same examples for every model; each row left out is listed with its line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dpkd.core.errors import UserError
from dpkd.core.progress import say
from dpkd.core.prompts.control_tokens import TemplateMismatchError
from dpkd.core.prompts.examples import Example, Message, SkippedRow
from dpkd.core.prompts.limits import TextCounts
from dpkd.core.prompts.sources import iter_examples
from dpkd.core.prompts.templates import EncodedPrompt, PromptEncoder
from dpkd.evaluate.inputs.models import Candidate
from dpkd.evaluate.inputs.named_sets import open_set
from dpkd.evaluate.inputs.turns import FollowUp, questions
from dpkd.evaluate.metrics.buckets import num_words, resolve_edges
from dpkd.evaluate.metrics.rouge import LostText, find_lost_text
from dpkd.evaluate.options.eval import EvalConfig

_NUM_PRINTED = 3
_NOTHING_LOST = LostText(0, 0, 0)
#: why a row is left out that has none
#: why a row of an evaluation set is skipped; reports record it
NOT_SCORABLE = "no reference to score against"


@dataclass(frozen=True)
class EvalSet:
    """One data set: `examples` in file order; `prompts[model][i]` is the prompt of `examples[i]` for a model.

    `indices[i]` is the index of `examples[i]` among the `num_rows` rows read, `lengths[i]` the length of its gold
    response, which decides its bucket between `edges`. `lost` counts what Rouge's tokens lose of the references.
    `follow_ups[i]` says what comes before `examples[i]` if it is asked after the model's own answers, which are to the
    examples before it; its prompt in `prompts` has the references in their place. `encoders` are the models'.
    """

    name: str
    identity: dict[str, str]
    examples: list[Example]
    prompts: dict[str, list[EncodedPrompt]]
    skipped: list[SkippedRow]
    num_rows: int = 0
    indices: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    edges: tuple[int, ...] = ()
    lost: LostText = _NOTHING_LOST
    follow_ups: dict[int, FollowUp] = field(default_factory=dict)
    encoders: dict[str, PromptEncoder] = field(default_factory=dict)

    @property
    def num_without_reference(self) -> int:
        """Rows left out because they have no reference."""
        return sum(row.reason == NOT_SCORABLE for row in self.skipped)

    def asked(self, index: int, texts: Sequence[str | None]) -> Example:
        """`examples[index]` as a model is asked it that answered `texts` to the examples before it."""
        follow_up = self.follow_ups.get(index)
        if follow_up is None:
            return self.examples[index]
        return follow_up.asked([text or "" for text in texts[index - len(follow_up.places) : index]])

    def prompt_text(self, model: str, index: int, texts: Sequence[str]) -> str:
        """The prompt of `examples[index]` as `model`, with its answers `texts`, got it.

        The row's own words if the model got none.
        """
        if index in self.follow_ups and model in self.encoders:
            return self.encoders[model].prompt(self.asked(index, texts)).text
        return self.prompts[model][index].text if model in self.prompts else self.question(index)

    def question(self, index: int) -> str:
        """The row's own words, without a template."""
        return "\n\n".join(turn.content for turn in self.messages(index))

    def messages(self, index: int) -> tuple[Message, ...]:
        """The row as chat turns: one of the user, unless it has several."""
        example = self.examples[index]
        if example.messages is not None:
            return example.messages
        parts = (part for part in (example.instruction or example.prompt, example.input) if part)
        return (Message("user", "\n\n".join(parts)),)

    def categories(self) -> dict[str, list[int]]:
        """The indices of the rows of each category, the largest first; empty if the rows have less than two."""
        found: dict[str, list[int]] = {}
        for index, example in enumerate(self.examples):
            found.setdefault(example.category, []).append(index)
        return dict(sorted(found.items(), key=lambda item: -len(item[1]))) if len(found) > 1 else {}


def read_eval_sets(config: EvalConfig, candidates: Sequence[Candidate]) -> list[EvalSet]:
    """The data sets of `config`, in its order, with prompts encoded by each candidate's own tokenizer.

    A row that one model cannot take is left out for all models, so that their means are over the same rows. Raises
    `UserError` for a missing or malformed file, and for a set without a usable row.
    """
    if config.bucket_by == "tokens" and not candidates:
        raise UserError(
            "buckets by tokens need a model's tokenizer",
            where="--bucket-by",
            advice="Add --model, or give --bucket-by words",
        )
    sets = [_read_eval_set(name, path, config, candidates) for name, path in config.data.items()]
    for eval_set in sets:
        _print_skipped(eval_set)
        if eval_set.lost.message:
            say(f"data {eval_set.name}: {eval_set.lost.message}")
        if not eval_set.examples:
            first = eval_set.skipped[0]
            raise UserError(
                f"no row of data {eval_set.name} can be evaluated",
                found=f"line {first.line}: {first.reason}",
                where=config.data[eval_set.name],
                advice="Give rows with a reference (`output`) and prompts of at most --max-prompt-tokens",
            )
    return sets


def _read_eval_set(name: str, path: str, config: EvalConfig, candidates: Sequence[Candidate]) -> EvalSet:
    source = open_set(path, config.field)
    examples: list[Example] = []
    prompts: dict[str, list[EncodedPrompt]] = {candidate.name: [] for candidate in candidates}
    skipped: list[SkippedRow] = []
    indices: list[int] = []
    follow_ups: dict[int, FollowUp] = {}
    num_rows, text = 0, TextCounts()
    for num_rows, item in enumerate(iter_examples(source, config.limit), start=1):
        if isinstance(item, SkippedRow):
            skipped.append(item)
            continue
        for example, follow_up in questions(item, config.turns):
            encoded = _encode(example, follow_up, config, candidates)
            if isinstance(encoded, SkippedRow):
                skipped.append(encoded)
                break  # later turns come after the answer to this one
            if follow_up is not None:
                follow_ups[len(examples)] = follow_up
            examples.append(example)
            indices.append(num_rows - 1)
            for candidate, prompt in zip(candidates, encoded, strict=True):
                prompts[candidate.name].append(prompt)
        if candidates:
            text.add(candidates[0].encoder, item, references=config.perplexity)
    text.say(f"data {name}")
    identity = source.identity | {f"field {ours}": theirs for ours, theirs in config.field.items()}
    lengths = [_gold_length(example, config, candidates) for example in examples]
    return EvalSet(
        name,
        identity,
        examples,
        prompts,
        skipped,
        num_rows,
        indices,
        lengths,
        resolve_edges(config.buckets, lengths) if lengths else (),
        find_lost_text([example.references for example in examples], config.rouge_tokenizer),
        follow_ups,
        {candidate.name: candidate.encoder for candidate in candidates},
    )


def _gold_length(example: Example, config: EvalConfig, candidates: Sequence[Candidate]) -> int:
    if config.bucket_by == "words":
        return num_words(example.references)
    return len(candidates[0].source.tokenizer.encode(example.references[0], add_special_tokens=False))


def _encode(
    example: Example, follow_up: FollowUp | None, config: EvalConfig, candidates: Sequence[Candidate]
) -> list[EncodedPrompt] | SkippedRow:
    most = config.max_prompt_tokens
    if not example.references:
        return SkippedRow(example.line, NOT_SCORABLE)
    prompts = []
    for candidate in candidates:
        try:
            prompt = candidate.encoder.prompt(example if follow_up is None else follow_up.asked(follow_up.golds))
            answers = 0 if follow_up is None else len(follow_up.places) * config.max_new_tokens
            longest = len(prompt.ids) if follow_up is None else len(candidate.encoder.prompt(example).ids) + answers
        except TemplateMismatchError as error:
            return SkippedRow(example.line, str(error))
        longest = max(longest, len(prompt.ids))
        if longest > most:
            with_answers = f", {answers} of them for its own answers" if answers else ""
            reason = f"prompt of {longest} tokens for model {candidate.name}{with_answers}, over {most}"
            return SkippedRow(example.line, reason)
        prompts.append(prompt)
    return prompts


def _print_skipped(eval_set: EvalSet) -> None:
    if not eval_set.skipped:
        return
    without = eval_set.num_without_reference
    say(
        f"data {eval_set.name}: {len(eval_set.examples)} rows evaluated, {len(eval_set.skipped)} left out"
        + (f", {without} of them without a reference:" if without else ":")
    )
    for row in eval_set.skipped[:_NUM_PRINTED]:
        say(f"  line {row.line}: {row.reason}")
    if len(eval_set.skipped) > _NUM_PRINTED:
        say(f"  and {len(eval_set.skipped) - _NUM_PRINTED} more; all are in report.json under `skipped`")
