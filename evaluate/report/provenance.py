"""Provenance, as shown in reports, tables and plots: command, models, decoding, software."""

from __future__ import annotations

import re
import shlex
from typing import Any

from dpkd.core.identity import fingerprint
from dpkd.core.settings import Settings
from dpkd.evaluate.options.eval import EvalConfig

#: the settings that decide how answers are drawn
DECODING = ("template", "temperature", "top_p", "seeds", "max_new_tokens", "engine", "dtype")
#: digits of a fingerprint that are shown; `report.json` has all
SHOWN_DIGITS = 12

_HIDDEN = "***"
_USER_OF_URL = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY_OF_URL = re.compile(r"(?<=[?&])([^=&\s]+)=[^&\s]+")
_TOKEN = re.compile(r"\b(?:hf_|sk-|ghp_|AKIA)[A-Za-z0-9_-]{12,}")


def redacted(text: str) -> str:
    """`text` without possible secrets: user and password of a URL, values of its query, tokens of known services."""
    text = _USER_OF_URL.sub(f"{_HIDDEN}@", text)
    if "://" in text:
        text = _QUERY_OF_URL.sub(rf"\1={_HIDDEN}", text)
    return _TOKEN.sub(_HIDDEN, text)


def command_text(config: Settings, command: str) -> str:
    """The shell command with all options of `config` that differ from the default.

    Built from the options, not from the command line: a recipe's steps and a notebook have none.
    """
    words = ["dpkd", command]
    for key, field in type(config).model_fields.items():
        value = getattr(config, key)
        if not field.is_required() and value == field.default:
            continue
        flag = config.flag(key)
        if config.is_positional(key):
            words += value
        elif isinstance(value, dict):
            words += [word for name, text in value.items() for word in (flag, f"{name}={text}")]
        elif field.annotation == tuple[str, ...]:
            words += [word for text in value for word in (flag, text)]
        elif isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, _as_option(value)]
    return shlex.join(redacted(word) for word in words)


def _as_option(value: Any) -> str:
    if value is None:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def about_models(config: EvalConfig, identity: dict[str, Any]) -> dict[str, Any]:
    """What `report.json` says of each model or set of predictions; `data` is filled with scores later.

    `fingerprint` is of the identity: weights, config, tokenizer and template of a model, or files of predictions.
    """
    models: dict[str, Any] = {}
    files = config.prediction_files()
    for name in config.names:
        is_model = name in config.model
        kind = "models" if is_model else "predictions"
        models[name] = {
            "directory": redacted(config.model[name]) if is_model else None,
            "files": None if is_model else {data: redacted(file) for data, file in files[name].items()},
            "fingerprint": fingerprint(identity.get(kind, {}).get(name)),
            "decoding": {key: identity["settings"].get(key) for key in DECODING} if is_model else None,
            "data": {},
        }
    return models


def decoding_text(report: dict[str, Any]) -> str:
    """How the answers were drawn, in words; by model if it was not the same for all."""
    names: dict[str, list[str]] = {}
    for name, model in report["models"].items():
        names.setdefault(drawn_text(model["decoding"]), []).append(name)
    if len(names) == 1:
        return next(iter(names))
    return "; ".join(f"{', '.join(those)}: {text}" for text, those in names.items())


def drawn_text(decoding: dict[str, Any] | None) -> str:
    """Template, temperature, top-p, seeds and the longest answer in tokens."""
    if decoding is None:
        return "given as text"
    seeds = ", ".join(map(str, decoding["seeds"]))
    drawn = (
        "greedy"
        if decoding["temperature"] == 0
        else f"temperature {decoding['temperature']:g}, top-p {decoding['top_p']:g}"
    )
    label = "seeds" if len(decoding["seeds"]) > 1 else "seed"
    return f"template {decoding['template']}, {drawn}, {label} {seeds}, at most {decoding['max_new_tokens']} tokens"


def model_text(model: dict[str, Any]) -> str:
    """A model's directory (or its predictions' files) and the first digits of its fingerprint."""
    place = model["directory"] or ", ".join(dict.fromkeys((model["files"] or {}).values()))
    return f"{place} ({model['fingerprint'][:SHOWN_DIGITS]})"


def data_text(report: dict[str, Any], data: str) -> str:
    """How many rows a set has, how many were left out, and contamination."""
    about = report["data"][data]
    text = f"{about['n']} rows"
    if num_skipped := len(report["skipped"][data]):
        text += f", {num_skipped} left out"
    if about["num_without_reference"]:
        text += f", {about['num_without_reference']} of them without a reference"
    if about["num_not_common"]:
        text += f", {about['num_not_common']} more in only some of the evaluations"
    for key, what in (("overlap", "training cache"), ("duplicates", "training data")):
        if report.get(key) and data in report[key]["rows"]:
            text += f", {len(report[key]['rows'][data])} prompts also in the {what}"
    return text


def software_text(report: dict[str, Any]) -> str:
    """Names and versions of the packages that can change a number."""
    return ", ".join(f"{name} {version}" for name, version in report["software"].items())


def how_made(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The whole provenance as (what, text)."""
    lines = [("Command", report["command"])]
    for data, identity in report["identities"]["data"].items():
        sha256 = identity.get("sha256", "")
        place = report["data"][data]["file"]
        lines.append((f"Data {data}", f"{place}: {data_text(report, data)} (sha256 {sha256[:SHOWN_DIGITS]})"))
    for name, model in report["models"].items():
        lines.append((f"Model {name}" if model["directory"] else f"Predictions {name}", model_text(model)))
        lines.append((f"Answers of {name}", _answers_text(model)))
    for name, run in report["runs"].items():
        lines.append((f"Run {name}", f"{run['directory']} ({run['num_steps']} steps)"))
    for part in report["merged"] or []:
        lines.append((f"From {part['directory']}", f"{part['command']} ({part['fingerprint'][:SHOWN_DIGITS]})"))
    lines.append(("Software", software_text(report)))
    lines.append(("Fingerprint", report["fingerprint"][:SHOWN_DIGITS]))
    return lines


def _answers_text(model: dict[str, Any]) -> str:
    decoding = model["decoding"]
    if decoding is not None:
        return f"{drawn_text(decoding)}; {decoding['engine']}, {decoding['dtype']}"
    seeds = {str(seed["seed"]): None for summary in model["data"].values() for seed in summary["seeds"]}
    if len(seeds) == 1:  # a file without seeds has one
        return drawn_text(None)
    return f"{drawn_text(None)}, seeds {', '.join(seeds)}"
