"""Which parts of several evaluations belong together: sets by content, models by name and content, settings alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.identity import fingerprint
from dpkd.core.progress import say
from dpkd.evaluate.merge.evaluations import Evaluation, Row
from dpkd.evaluate.report.provenance import DECODING, drawn_text

#: settings by which scores are made, and which no option lets differ
_SCORING = {
    "rouge_tokenizer": "--rouge-tokenizer",
    "bucket_by": "--bucket-by",
    "bucket_of": "--bucket-of",
}
#: what of the decoding must agree; engine and number type are stated
_DRAWING = tuple(key for key in DECODING if key not in ("engine", "dtype"))


@dataclass(frozen=True)
class Part:
    """One model on one set: under their names in the merged report, and those of the evaluation."""

    model: str
    data: str
    evaluation: Evaluation
    own_model: str
    own_data: str

    @property
    def about(self) -> dict[str, Any]:
        """What the evaluation's report says of the model."""
        found: dict[str, Any] = self.evaluation.report["models"][self.own_model]
        return found

    def rows(self) -> dict[int, dict[str, Row]]:
        """By seed, by the example's id."""
        return self.evaluation.rows(self.own_model, self.own_data)


def check_scoring(evaluations: Sequence[Evaluation]) -> None:
    """Raise `UserError` for scores that were made in different ways."""
    first = evaluations[0]
    for other in evaluations[1:]:
        for key, flag in _SCORING.items():
            ours, theirs = first.report["settings"][key], other.report["settings"][key]
            if ours != theirs:
                raise UserError(
                    f"the evaluations were scored with another `{key}`",
                    found=f"{theirs} in {other.place}",
                    expected=f"{ours} as in {first.place}",
                    advice=f"Evaluate one of them again with the other's {flag}; with --generations nothing is "
                    "generated again",
                )


def match_sets(evaluations: Sequence[Evaluation]) -> dict[tuple[Path, str], str]:
    """The name in the merged report of each (evaluation, set): sets of equal content have one, the first's."""
    contents: dict[str, tuple[str, Evaluation, str]] = {}  # by content: name, and where it was met first
    names: dict[str, str] = {}
    found = {}
    for evaluation in evaluations:
        for own, identity in evaluation.report["identities"]["data"].items():
            content = fingerprint({key: value for key, value in identity.items() if key != "name"})
            if content not in contents:
                if own in names:
                    _, first, _ = contents[names[own]]
                    raise UserError(
                        f"two sets of other content have the name {own!r}",
                        found=f"sha256 {identity['sha256'][:12]} in {evaluation.place}",
                        expected=f"{first.report['identities']['data'][own]['sha256'][:12]} as in {first.place}",
                        advice="Merge evaluations of the same data, or evaluate one again with --data OTHER=FILE",
                    )
                contents[content], names[own] = (own, evaluation, own), content
            name, first, first_own = contents[content]
            if name != own:
                say(f"{evaluation.place}: the set {own} is {name} of {first.place}, and has its name here")
            edges = evaluation.report["data"][own]["edges"], first.report["data"][first_own]["edges"]
            if edges[0] != edges[1]:
                raise UserError(
                    f"the set {name} is cut into other buckets",
                    found=f"edges {edges[0]} in {evaluation.place}",
                    expected=f"{edges[1]} as in {first.place}",
                    advice="Evaluate one again with the other's --buckets; with --generations nothing is generated",
                )
            found[evaluation.place, own] = name
    return found


def match_models(evaluations: Sequence[Evaluation], sets: dict[tuple[Path, str], str]) -> list[Part]:
    """Every model on every set, each once.

    A model that several evaluations have under one name must be the same by content; where they have it on the same
    set with the same answers it is taken once. Raises `UserError` for two things of one name.
    """
    parts: dict[tuple[str, str], Part] = {}
    firsts: dict[str, Part] = {}
    for evaluation in evaluations:
        for own_model, own_data in evaluation.parts():
            name, data = evaluation.renamed(own_model), sets[evaluation.place, own_data]
            part = Part(name, data, evaluation, own_model, own_data)
            if difference := _difference(firsts.setdefault(name, part), part):
                raise _collision(firsts[name], part, difference)
            if (before := parts.get((name, data))) is not None:
                if not _same_answers(before, part):
                    raise _collision(before, part, "other answers")
                say(f"{name} on {data} stands in {before.evaluation.place} and in {evaluation.place} alike; taken once")
                continue
            parts[name, data] = part
    return list(parts.values())


def _difference(first: Part, part: Part) -> str | None:
    """What makes two models of one name different ones; None where nothing does."""
    if (first.about["directory"] is None) != (part.about["directory"] is None):
        return "a model and predictions"
    # predictions are named by their files, and each set has its own
    if part.about["directory"] is not None and first.about["fingerprint"] != part.about["fingerprint"]:
        return f"fingerprints {first.about['fingerprint'][:12]} and {part.about['fingerprint'][:12]}"
    if first.about["decoding"] != part.about["decoding"]:
        return f"{drawn_text(first.about['decoding'])}, and {drawn_text(part.about['decoding'])}"
    return None


def _same_answers(first: Part, part: Part) -> bool:
    """Whether two parts hold the same rows but for the names of model and set."""

    def plain(rows: dict[int, dict[str, Row]]) -> dict[int, dict[str, Row]]:
        return {
            seed: {key: row | {"model": "", "data": ""} for key, row in by_id.items()} for seed, by_id in rows.items()
        }

    return plain(first.rows()) == plain(part.rows())


def _collision(first: Part, part: Part, difference: str) -> UserError:
    place = part.evaluation.place
    return UserError(
        f"two evaluations have something of the name {part.model!r} ({difference})",
        found=place,
        expected=f"another name than in {first.evaluation.place}",
        advice=f"Give one a name of its own: {place.resolve().name}={place}",
    )


def check_decoding(parts: Sequence[Part]) -> None:
    """Answers of models must have been drawn alike; how given texts were drawn is not known."""
    drawn = [part for part in parts if part.about["decoding"] is not None]
    for part in drawn[1:]:
        first = drawn[0]
        for key in _DRAWING:
            ours, theirs = first.about["decoding"][key], part.about["decoding"][key]
            if ours != theirs:
                raise UserError(
                    f"the answers of the models were drawn otherwise: `{key}`",
                    found=f"{theirs} for {part.model} in {part.evaluation.place}",
                    expected=f"{ours} as for {first.model} in {first.evaluation.place}",
                    advice="Evaluate one of them again with the other's settings, or give --allow-different-decoding, "
                    "and the report says which is which",
                )
