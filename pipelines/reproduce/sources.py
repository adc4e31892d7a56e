"""What an artefact is made from, as the steps left it: reports, validations of runs, measures of copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpkd.core.errors import UserError
from dpkd.core.identity import fingerprint, software_versions
from dpkd.core.json_lines import read_json_lines
from dpkd.core.settings import SAVED_OPTIONS, read_toml
from dpkd.evaluate.report.provenance import SHOWN_DIGITS, software_text
from dpkd.evaluate.report.provenance import how_made as report_lines
from dpkd.pipelines.commands.noise import REPORT as NOISE_REPORT
from dpkd.pipelines.reproduce.options import ReproduceConfig

_AGAIN = "Run the recipe's steps again: dpkd reproduce does so"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that a step wrote; raises `UserError` when it is missing or is no JSON."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError("the output of a step is missing", where=path, advice=_AGAIN) from None
    except ValueError as error:
        raise UserError(f"the output of a step cannot be read: {error}", where=path, advice=_AGAIN) from None


def read_validations(runs: tuple[Path, ...]) -> list[dict[str, Any]]:
    """The validations of runs that follow each other, as one training: `step` and `epoch` count on, epochs from 1.

    Those before a run's first step are left out: the paper has none, and a round starts where the last one ended.
    Raises `UserError` for a run that was not validated, or whose cache keeps no distributions.
    """
    lines: list[dict[str, Any]] = []
    first_step, first_epoch = 0, 0
    for run in runs:
        epochs = {line["step"]: line["epoch"] for line in _read_lines(run / "metrics.jsonl")}
        for line in _read_lines(run / "validation.jsonl"):
            if line["step"] == 0:
                continue
            for name in ("rkld_first", "kld_first", "reward_chosen"):
                if line.get(name) is None:
                    raise UserError(
                        f"the validations have no {name}",
                        where=run / "validation.jsonl",
                        advice="Train from a cache with distributions (--top-k 64) and a preference",
                    )
            step, epoch = line["step"] + first_step, epochs[line["step"]] + first_epoch + 1
            lines.append({**line, "step": step, "epoch": epoch, "run": str(run)})
        first_step, first_epoch = first_step + max(epochs), first_epoch + max(epochs.values()) + 1
    return lines


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError("the output of a step is missing", where=path, advice=_AGAIN)
    lines = [line for _, line in read_json_lines(path)]
    if not lines:
        raise UserError("the log of a run is empty", where=path, advice=_AGAIN)
    return lines


def how_made(config: ReproduceConfig, command: str) -> dict[str, Any]:
    """Provenance of an artefact, for its JSON: `command`, which makes it again, and `made`, lines of `what` and `text`.

    These are data, rows, seeds, decoding, models with fingerprints and software of everything that `config` names.
    """
    lines: list[tuple[str, str]] = []
    if config.report is not None:
        report = read_json(config.report / "report.json")
        wanted = set(report["models"]) if config.noise is not None or not config.rows else set(config.rows)
        dropped = {f"{kind} {name}" for name in report["models"] if name not in wanted for kind in _KINDS}
        dropped |= {f"Data {name}" for name in report["data"] if name not in config.data}
        lines += [(what, text) for what, text in report_lines(report) if what not in dropped | {"Software"}]
        lines = [("Evaluation", text) if what == "Command" else (what, text) for what, text in _merged(lines)]
    caches = [str(_options_of(run)["cache"]) for runs in config.runs.values() for run in runs]
    for name, runs in config.runs.items():
        lines += [(f"Training of {name}", _run_text(run)) for run in runs]
    if config.noise is not None:
        noise = read_json(config.noise / NOISE_REPORT)
        caches.append(noise["cache_directory"])
        lines.append(
            (
                "Measured on",
                f"{noise['copies'][0]['rows']} rows of the cache {noise['cache_directory']}, beta {noise['beta']:g}; "
                f"copies of {noise['model_directory']} "
                f"(weights {str(noise['model']['weights_sha256'])[:SHOWN_DIGITS]})",
            )
        )
    lines += [(f"Cache {location}", _cache_text(location)) for location in dict.fromkeys(caches)]
    lines = [("Command", command), *lines, ("Software", software_text({"software": software_versions()}))]
    return {"command": command, "made": [{"what": what, "text": text} for what, text in lines]}


def _merged(lines: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """How the answers of all models were drawn in one line, where it is the same for all."""
    drawn = [text for what, text in lines if what.startswith("Answers of ")]
    if len(set(drawn)) != 1:
        return lines
    return [line for line in lines if not line[0].startswith("Answers of ")] + [("Answers of all", drawn[0])]


_KINDS = ("Model", "Predictions", "Answers of", "Run")


def _run_text(run: Path) -> str:
    """What a run learnt from what, in short."""
    held = read_json(run / "dpkd-run.json")
    options, facts = held["options"], read_json(run / "run.json")
    return (
        f"{run} ({fingerprint(held)[:SHOWN_DIGITS]}): {options['objective']}, {options['level']} level, beta "
        f"{options['beta']:g}, {facts['steps']} steps of {held['rows_per_step']} rows, learning rate "
        f"{options['learning_rate']:g}, seed {options['seed']}; validated on {held['validation']['examples']} held-out "
        f"examples of the cache {_options_of(run)['cache']}; from the student "
        f"{_options_of(run)['student']} (weights {str(facts['student']['weights_sha256'])[:SHOWN_DIGITS]})"
    )


def _options_of(run: Path) -> dict[str, Any]:
    return read_toml(run / SAVED_OPTIONS)


def _cache_text(location: str) -> str:
    """What a cache is, in short."""
    from dpkd.teacher_cache.store.reader import TeacherCache

    cache = TeacherCache.open(location)
    held, drawn = cache.identities, cache.identities["generation"]
    num_rows = sum(shard.rows for shard in cache.shards())
    return (
        f"{num_rows} rows ({drawn['responses']} responses) of {held['data']['name']} "
        f"(sha256 {held['data']['sha256'][:SHOWN_DIGITS]}), teacher {held['teacher']['name']} (weights "
        f"{str(held['teacher']['weights_sha256'])[:SHOWN_DIGITS]}), template {held['template']['name']}, temperature "
        f"{drawn['temperature']:g}, top-p {drawn['top_p']:g}, seed {drawn['seed']}, at most {drawn['max_new_tokens']} "
        f"tokens, top {held['logprobs']['top_k']} ({cache.fingerprint[:SHOWN_DIGITS]})"
    )
