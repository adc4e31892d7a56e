"""Typed, frozen options: unknown keys are refused, `none` switches an optional one off."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from dpkd.core.errors import UserError


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


#: a directory, or the URL of one in an object store
Location = Annotated[str, BeforeValidator(_as_text)]


def split_commas(value: Any) -> Any:
    """The parts of a text with commas, and one number as a list of it: what an option of several values is given as."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return [value] if isinstance(value, (int, float)) else value


def named_values(value: Any, form: str, example: str) -> Any:
    """Texts `NAME=VALUE` as a dict, for a repeatable option; ValueError for another form or a name twice."""
    pairs = [value] if isinstance(value, str) else value
    if not isinstance(pairs, (list, tuple)):
        return value
    named: dict[str, str] = {}
    for pair in pairs:
        name, equals, text = str(pair).partition("=")
        if not equals or not text:
            raise ValueError(f"{pair!r} is not of the form {form}, such as {example}")
        if name in named:
            raise ValueError(f"the name {name!r} is given twice, for {named[name]!r} and {text!r}")
        named[name] = text
    return named


class Settings(BaseModel):
    """Base of every command's options. Values may come as text (`"8"`, `"10,20"`, `"none"`)."""

    # validators are built when the first config is: a page of help, or a recipe's read without running it, needs few
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), defer_build=True
    )

    #: options that `--set` and TOML reach, but that have no flag of their own
    set_only: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _none_is_off(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            key: None
            if isinstance(value, str)
            and value.lower() == "none"
            and key in cls.model_fields
            and type(None) in get_args(cls.model_fields[key].annotation)
            else value
            for key, value in values.items()
        }

    @classmethod
    def parse(cls, values: dict[str, Any], *, where: str) -> Self:
        """Validate `values`; raises `UserError` (first problem named, the rest counted) instead of pydantic's error."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _first_problem(cls, error, where) from None

    @classmethod
    def parse_known(cls, values: dict[str, Any], *, where: str) -> None:
        """Raise `UserError` for keys of `values` that are no options."""
        unknown = [key for key in values if key not in cls.model_fields]
        if unknown:
            raise _unknown_option(cls, unknown[0], len(unknown), where)

    def to_toml(self) -> str:
        """The resolved options as TOML; options that are off are left out, as TOML has no null."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def _first_problem(cls: type[Settings], error: ValidationError, where: str) -> UserError:
    problems = error.errors(include_url=False)
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"]) or cls.__name__
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        return UserError(
            f"unknown option {key!r}{more}",
            where=where,
            advice=f"Known options: {', '.join(sorted(cls.model_fields))}",
        )
    if first["type"] == "missing":
        return UserError(
            f"option {key!r} is needed{more}",
            where=where,
            advice=f"Give --{key.replace('_', '-')} or the TOML key {key!r}",
        )
    if first["type"] == "value_error":
        return UserError(f"option {key!r} cannot be used{more}: {first['ctx']['error']}", where=where)
    message = first["msg"]
    return UserError(
        f"option {key!r} cannot be used{more}",
        found=repr(first["input"]),
        expected=message[0].lower() + message[1:],
        where=where,
    )


def _unknown_option(cls: type[Settings], key: str, count: int, where: str) -> UserError:
    more = f" (and {count - 1} more)" if count > 1 else ""
    known = difflib.get_close_matches(key, cls.model_fields, n=1)
    advice = f"Did you mean {known[0]!r}?" if known else f"Known options: {', '.join(sorted(cls.model_fields))}"
    return UserError(f"unknown option {key!r}{more}", where=where, advice=advice)


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dict; raises `UserError` when it is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("the config file is missing", where=path, advice="Give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"the config file is not TOML: {error}", where=path) from None
