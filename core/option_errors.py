"""One readable line for everything that is wrong with a command's options."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dpkd.core.errors import UserError

if TYPE_CHECKING:
    from pydantic import ValidationError

_MOST_PROBLEMS = 3
#: longest text of a choice that is listed whole, in characters
_SHORT_LIST = 120

#: what a value must be, by the type of pydantic's error; the fields come from the error's context
_WORDS = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be {le} or less",
    "finite_number": "must be a finite number",
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must start with a letter or digit and contain only those, '.', '_' and '-'",
    "string": "must be a text",
    "path": "must be a path",
    "too_short": "must have {min_length} or more values",
    "tuple": "must be a list",
    "dict": "must be a table of NAME = VALUE",
}


def similar(name: str, known: Iterable[str]) -> str | None:
    """The one known name that `name` is most likely a misspelling of."""
    # the dashes of flags would make all of them alike
    by_word = {word.lstrip("-"): word for word in known}
    found = difflib.get_close_matches(name.lstrip("-"), by_word, n=1)
    return by_word[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """The advice "Did you mean X?", or None if nothing is similar."""
    return f"Did you mean {found}?" if (found := similar(name, known)) else None


def explain(
    cls: Any, error: ValidationError, values: Mapping[str, Any], where: str, flags: Collection[str] | None
) -> UserError:
    """One error for all problems of `values`, options of `cls`: misspelt ones first, then missing ones, then values."""

    def named(key: str, missing: bool = False) -> str:
        if key not in cls.model_fields:
            return repr(key)
        return cls.flag(key) if flags is not None and (missing or key in flags) else f"`{key}`"

    problems = error.errors(include_url=False)
    unknown = [str(problem["loc"][0]) for problem in problems if problem["type"] == "extra_forbidden"]
    missing = [named(str(p["loc"][0]), True) for p in problems if p["type"] == "missing" and len(p["loc"]) == 1]
    invalid = [p for p in problems if p["type"] not in ("extra_forbidden", "missing") or len(p["loc"]) > 1]
    # a value that may have several types has a problem with each; a refusal in our own words stands for them all, and
    # does not repeat what may be a secret
    refused = {p["loc"][0] for p in invalid if p["type"] == "value_error" and p["loc"]}
    invalid = [p for p in invalid if p["type"] == "value_error" or not p["loc"] or p["loc"][0] not in refused]
    if missing or not problems[0]["loc"]:
        missing = [
            named(keys[0], True) + "".join(f" (or {named(key, True)})" for key in keys[1:])
            for keys in cls.one_of
            if not any(values.get(key) not in (None, "") for key in keys)
        ] + missing
        if not problems[0]["loc"] and missing:
            invalid = []
    texts = [_unknown(key, cls) for key in unknown]
    if missing:
        texts.append(_joined(missing) + (" is required" if len(missing) == 1 else " are required"))
    texts += dict.fromkeys(_invalid(problem, named) for problem in invalid)
    more = len(texts) - _MOST_PROBLEMS
    what = "; ".join(texts[:_MOST_PROBLEMS]) + (f"; and {more} more problems" if more > 0 else "")
    wrong = {*unknown, *(str(problem["loc"][0]) for problem in invalid if problem["loc"])}
    return UserError(
        what,
        where=None if flags is not None and wrong <= {*flags} else where,
        advice=f"Example: {cls.example}" if missing and cls.example and flags is not None else None,
    )


def _unknown(key: str, cls: Any) -> str:
    found = similar(key, cls.model_fields)
    return f"unknown option `{key}`" + (f" (did you mean `{found}`?)" if found else "")


def _invalid(problem: Any, named: Any) -> str:
    if not problem["loc"]:  # a rule about several options, which names them itself
        return str(problem.get("ctx", {}).get("error", problem["msg"]))
    name, kind, context = named(str(problem["loc"][0])), problem["type"], problem.get("ctx", {})
    if kind == "value_error":
        return f"{name}: {context['error']}"
    if kind == "literal_error":
        return f"{name} {_choices(problem)}"
    words = _WORDS.get(kind) or _WORDS.get(kind.partition("_")[0]) or "cannot have this value"
    limits = {key: f"{value:g}" if isinstance(value, (int, float)) else value for key, value in context.items()}
    return f"{name} {words.format_map(limits)}, found {_shown(problem['input'])}"


def _choices(problem: Any) -> str:
    choices = [choice.strip("'") for choice in problem["ctx"]["expected"].replace(" or ", ", ").split(", ")]
    value = problem["input"]
    found = similar(value, choices) if isinstance(value, str) else None
    listed = _joined(choices, "or")
    if len(listed) > _SHORT_LIST and found:
        return f"has no choice {_shown(value)}; did you mean {found}?"
    return f"must be {listed}, found {_shown(value)}" + (f" (did you mean {found}?)" if found else "")


def _joined(words: list[str], last: str = "and") -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value and not set(value) & set(" ;,()\n\t") else repr(value)
