"""The report on verdicts as data: who judged whose answers, the scores, unreadable replies, the cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpkd.core.files import replacing
from dpkd.core.identity import fingerprint, software_versions
from dpkd.evaluate.judge.questions import JudgePrompt
from dpkd.evaluate.judge.rows import Answers, JudgedSet, Question
from dpkd.evaluate.judge.scores import Outcomes, compare_grades, grades_of, summarise_grades, summarise_pairs
from dpkd.evaluate.judge.tokens import count_tokens
from dpkd.evaluate.judge.verdicts import Answered
from dpkd.evaluate.options.judge import JudgeConfig
from dpkd.evaluate.report.provenance import command_text

#: of `judge.json`; what each version holds is in docs/judge.md
FORMAT_VERSION = 2

_COLUMNS = (
    *("data", "example_id", "model", "seed", "other", "other_seed", "swapped", "question"),
    *("reply", "read", "finish_reason", "refused"),
)


def build_judge_report(
    config: JudgeConfig,
    prompt: JudgePrompt,
    identity: dict[str, Any],
    answers: Answers,
    sets: Sequence[JudgedSet],
    questions: Sequence[Question],
    answered: Mapping[str, Answered],
) -> dict[str, Any]:
    """Everything in `judge.json`; `answered` has the answer to each of `questions`, by key."""
    outcomes: Outcomes = {
        (q.data, q.row.example_id, q.model, q.seed, q.other, q.swapped and q.other is not None): _read(q, answered)
        for q in questions
    }
    report: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint(identity),
        "command": command_text(config, "judge"),
        "mode": config.mode,
        "settings": identity["settings"],
        "identities": {key: identity[key] for key in ("answers", "prompt")},
        "judged": {name: answers.about[name] for judged in sets for name in judged.answers},
        "judge": _about_judge(config, prompt, questions, answered),
        "data": {judged.name: {"n": len(judged.rows), "num_rows": len(judged.eval_set.examples)} for judged in sets},
        "unparsable": _unparsable(questions, answered),
        "refused": [
            {"data": q.data, "example_id": q.row.example_id, "model": q.model, "other": q.other, "reason": reason}
            for q in questions
            if (reason := answered[q.key].refused) is not None
        ],
        "tokens": count_tokens(config, [answered[key] for key in dict.fromkeys(q.key for q in questions)]),
        "software": software_versions(),
    }
    if config.mode == "pairwise":
        return report | {"pairs": {judged.name: summarise_pairs(judged, outcomes, config) for judged in sets}}
    models: dict[str, Any] = {}
    comparisons = {}
    for judged in sets:
        graded = {model: grades_of(judged, model, outcomes, config) for model in judged.answers}
        for model, grades_GSN in graded.items():
            models.setdefault(model, {"data": {}})["data"][judged.name] = summarise_grades(judged, model, grades_GSN)
        comparisons[judged.name] = compare_grades(judged, graded, config)
    return report | {"models": models, "comparisons": comparisons}


def write_per_verdict(path: Path, questions: Sequence[Question], answered: Mapping[str, Answered]) -> None:
    """Write one row per question to `path` (Parquet): what it is about, the reply, what was read from it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"seed": pa.int64(), "other_seed": pa.int64(), "swapped": pa.bool_()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in _COLUMNS])
    rows = []
    for q in questions:
        found = answered[q.key]
        read = found.parsed(q.prompt.form)
        last = found.replies[-1] if found.replies else None
        about = (q.data, q.row.example_id, q.model, q.seed, q.other, q.other_seed, q.swapped, q.key)
        reply = (last and last.content, read and " ".join(read), last and last.finish_reason, found.refused)
        rows.append(dict(zip(_COLUMNS, about + reply, strict=True)))
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary, compression="zstd")


def _read(question: Question, answered: Mapping[str, Answered]) -> tuple[str, ...] | None:
    """What was read from the reply; of two grades, that of the answer comes first."""
    found = answered[question.key].parsed(question.prompt.form)
    return found[::-1] if found is not None and question.prompt.form == "scores" and question.swapped else found


def _about_judge(
    config: JudgeConfig, prompt: JudgePrompt, questions: Sequence[Question], answered: Mapping[str, Answered]
) -> dict[str, Any]:
    said = Counter(reply.model for key in {q.key for q in questions} for reply in answered[key].replies)
    return {
        "url": config.judge_url,
        "model": config.judge_model,
        "models_said": {str(name): count for name, count in sorted(said.items(), key=str)},
        "body": config.request_body(),
        "prompt": {"name": prompt.name, "sha256": prompt.sha256},
        "reask": config.reask,
    }


def _unparsable(questions: Sequence[Question], answered: Mapping[str, Answered]) -> dict[str, Any]:
    """By model: questions about it, and how many have an unparsable reply or none."""
    counts: dict[str, Counter[str]] = {}
    for question in questions:
        found = answered[question.key]
        unread = found.refused is None and found.parsed(question.prompt.form) is None
        for model in filter(None, (question.model, question.other)):
            count = counts.setdefault(model, Counter())
            count["num_questions"] += 1
            count["num_refused"] += found.refused is not None
            count["num_unparsable"] += unread
            count["num_cut_off"] += unread and found.replies[-1].finish_reason == "length"
            count["num_asked_again"] += len(found.replies) > 1
    return {
        model: {**dict(count), "share": count["num_unparsable"] / count["num_questions"]}
        for model, count in counts.items()
    }
