"""Matching several evaluations: sets by content, models by name and content, settings that must agree."""

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

#: settings of the scores, which must always agree, with their flags
SCORING = {"rouge_tokenizer": "--rouge-tokenizer", "bucket_by": "--bucket-by", "bucket_of": "--bucket-of"}
# decoding settings that must agree; the report shows engine and dtype
_DRAWING = tuple(key for key in DECODING if key not in ("engine", "dtype"))


@dataclass(frozen=True)
class Part:
    """One model on one set: their names in the merged report, and in the evaluation."""

    model: str
    data: str
    evaluation: Evaluation
    own_model: str
    own_data: str

    @property
    def about(self) -> dict[str, Any]:
        """The evaluation's entry for the model."""
        found: dict[str, Any] = self.evaluation.report["models"][self.own_model]
        return found

    def rows(self) -> dict[int, dict[str, Row]]:
        """The rows by seed, then by example id."""
        return self.evaluation.rows(self.own_model, self.own_data)

    def ids(self) -> list[str]:
        """The ids of the examples, in the set's order."""
        return list(next(iter(self.rows().values())))


def check_scoring(evaluations: Sequence[Evaluation]) -> None:
    """Raise `UserError` if scores were computed in different ways."""
    first = evaluations[0]
    for other in evaluations[1:]:
        for key, flag in SCORING.items():
            ours, theirs = first.report["settings"][key], other.report["settings"][key]
            if ours != theirs:
                raise UserError(
                    f"the evaluations were scored with another `{key}`",
                    found=f"{theirs} in {other.directory}",
                    expected=f"{ours} as in {first.directory}",
                    advice=f"Evaluate one of them again with the other's {flag}; --generations reuses its answers",
                )


def match_sets(evaluations: Sequence[Evaluation]) -> dict[tuple[Path, str], str]:
    """The name in the merged report of each (evaluation, set): sets of equal content get the first one's name."""
    contents: dict[str, tuple[str, Evaluation, str]] = {}  # by content: name, first evaluation, its name there
    names: dict[str, str] = {}
    found = {}
    for evaluation in evaluations:
        for own, identity in evaluation.report["identities"]["data"].items():
            content = fingerprint({key: value for key, value in identity.items() if key != "name"})
            if content not in contents:
                if own in names:
                    _, first, _ = contents[names[own]]
                    raise UserError(
                        f"two sets with different content have the name {own!r}",
                        found=f"sha256 {identity['sha256'][:12]} in {evaluation.directory}",
                        expected=f"{first.report['identities']['data'][own]['sha256'][:12]} as in {first.directory}",
                        advice="Merge evaluations of the same data, or evaluate one again with --data OTHER=FILE",
                    )
                contents[content], names[own] = (own, evaluation, own), content
            name, first, first_own = contents[content]
            if name != own:
                say(f"{evaluation.directory}: the set {own} equals {name} in {first.directory} and gets its name")
            edges = evaluation.report["data"][own]["edges"], first.report["data"][first_own]["edges"]
            if edges[0] != edges[1]:
                raise UserError(
                    f"the set {name} has other buckets",
                    found=f"edges {edges[0]} in {evaluation.directory}",
                    expected=f"{edges[1]} as in {first.directory}",
                    advice="Evaluate one again with the other's --buckets; --generations reuses its answers",
                )
            found[evaluation.directory, own] = name
    return found


def match_models(evaluations: Sequence[Evaluation], sets: dict[tuple[Path, str], str]) -> list[Part]:
    """Every model on every set, each once.

    If several evaluations have the same model on the same set with the same answers, it counts once. Raises
    `UserError` for different models, or different answers, with the same name.
    """
    parts: dict[tuple[str, str], Part] = {}
    firsts: dict[str, Part] = {}
    for evaluation in evaluations:
        for own_model, own_data in evaluation.parts():
            name, data = evaluation.renamed(own_model), sets[evaluation.directory, own_data]
            part = Part(name, data, evaluation, own_model, own_data)
            if difference := _difference(firsts.setdefault(name, part), part):
                raise _collision(firsts[name], part, difference)
            if (before := parts.get((name, data))) is not None:
                if not _same_answers(before, part):
                    raise _collision(before, part, "other answers")
                say(f"{name} on {data} is equal in {before.evaluation.directory} and {evaluation.directory}: used once")
                continue
            parts[name, data] = part
    return list(parts.values())


def by_set(parts: Sequence[Part]) -> dict[str, list[Part]]:
    """The parts of each set of the merged report, in order."""
    found: dict[str, list[Part]] = {}
    for part in parts:
        found.setdefault(part.data, []).append(part)
    return found


def _difference(first: Part, part: Part) -> str | None:
    """Why two models of one name are different models; None if they are the same."""
    if (first.about["directory"] is None) != (part.about["directory"] is None):
        return "a model and predictions"
    # predictions have a file for each set, so these differ
    if part.about["directory"] is not None and first.about["fingerprint"] != part.about["fingerprint"]:
        return f"fingerprints {first.about['fingerprint'][:12]} and {part.about['fingerprint'][:12]}"
    if first.about["decoding"] != part.about["decoding"]:
        return f"{drawn_text(first.about['decoding'])}, and {drawn_text(part.about['decoding'])}"
    return None


def _same_answers(first: Part, part: Part) -> bool:
    """Whether two parts have the same rows, except for the names of model and set."""

    def plain(rows: dict[int, dict[str, Row]]) -> dict[int, dict[str, Row]]:
        return {
            seed: {key: row | {"model": "", "data": ""} for key, row in by_id.items()} for seed, by_id in rows.items()
        }

    return plain(first.rows()) == plain(part.rows())


def _collision(first: Part, part: Part, difference: str) -> UserError:
    directory = part.evaluation.directory
    return UserError(
        f"two evaluations use the name {part.model!r} for different things ({difference})",
        found=directory,
        expected=f"another name than in {first.evaluation.directory}",
        advice=f"Rename one of them: {directory.resolve().name}={directory}",
    )


def check_decoding(parts: Sequence[Part]) -> None:
    """Raise `UserError` if models drew their answers in different ways; for predictions this is unknown."""
    drawn = [part for part in parts if part.about["decoding"] is not None]
    for part in drawn[1:]:
        first = drawn[0]
        for key in _DRAWING:
            ours, theirs = first.about["decoding"][key], part.about["decoding"][key]
            if ours != theirs:
                raise UserError(
                    f"the models drew their answers with different `{key}`",
                    found=f"{theirs} for {part.model} in {part.evaluation.directory}",
                    expected=f"{ours} as for {first.model} in {first.evaluation.directory}",
                    advice="Evaluate one of them again with the other's settings, or give --allow-different-decoding",
                )
