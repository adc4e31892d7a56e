"""Typed, frozen options in named groups. One declaration gives the flag, the TOML key, the help and the errors."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from dpkd.core.errors import UserError
from dpkd.core.urls import url_problem

#: the file of an output directory with the options that made it
SAVED_OPTIONS = "dpkd.toml"

DeviceName = Literal["auto", "cpu", "cuda"]


def _as_location(value: Any) -> Any:
    text = str(value) if isinstance(value, Path) else value
    if isinstance(text, str) and (problem := url_problem(text)):
        raise ValueError(problem)
    return text


def _as_local_path(value: Any) -> Any:
    """Refuse a URL, which `Path` would take for a directory of this machine; the error does not repeat it."""
    # a Path made of a URL has lost one of its slashes
    slashes = "/" if isinstance(value, Path) else "//"
    if found := re.match(rf"([a-zA-Z][a-zA-Z0-9+.-]+):{slashes}", str(value)):
        raise ValueError(
            f"must be a local path, found a URL ({found[1]}://...); only teacher caches can be at URLs: "
            "give a local path, and copy the files"
        )
    return value


class Metavar(str):
    """How `--help` writes a value of a type, as part of its annotation."""


#: a directory, or the URL of one in an object store; one that may hold a secret is refused before anything is saved
Location = Annotated[str, BeforeValidator(_as_location), Metavar("PATH|URL")]
#: the URL of a server, under the same rule
Address = Annotated[str, BeforeValidator(_as_location), Metavar("URL")]

#: a file or directory of this machine
LocalPath = Annotated[Path, BeforeValidator(_as_local_path), Metavar("PATH")]


def split_commas(value: Any) -> Any:
    """The parts of a comma-separated text; a single number as a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return [value] if isinstance(value, (int, float)) else value


def several_texts(value: Any) -> Any:
    """The parts of a comma-separated text that are not empty."""
    return [part for part in split_commas(value) if part] if isinstance(value, str) else value


def named_values(value: Any, form: str, example: str) -> Any:
    """Texts `NAME=VALUE` as a dict, for a repeatable option; ValueError for another form or a repeated name."""
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


#: variables of a chat template by name, as text
TemplateArguments = Annotated[
    dict[str, str], BeforeValidator(lambda value: named_values(value, "KEY=VALUE", "enable_thinking=false"))
]


class Settings(BaseModel):
    """Base of every command's options. Values may be given as text (`"8"`, `"10,20"`, `"none"`).

    A command's class either lists its fields itself or inherits them from groups: subclasses with a `title` each, the
    most used group first. `--help`, saved TOML files and recorded commands keep that order.
    """

    # pydantic builds the validators when the first config is made: help needs none
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        protected_namespaces=(),
        defer_build=True,
        allow_inf_nan=False,
    )

    #: heading of the group in `--help`
    title: ClassVar[str] = "Options"
    #: of each of these groups of options at least one is required
    one_of: ClassVar[tuple[tuple[str, ...], ...]] = ()
    #: whether the command takes `--config FILE` and `--set KEY=VALUE`
    from_files: ClassVar[bool] = True
    #: a command line that works, for `--help` and for errors about missing options
    example: ClassVar[str] = ""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        # pydantic collects the fields of the last base first
        fields = {key: cls.model_fields[key] for keys in cls.groups().values() for key in keys}
        cls.model_fields.clear()
        cls.model_fields.update(fields)

    @classmethod
    def groups(cls) -> dict[str, list[str]]:
        """Option names by the title of their group, in the order of `--help`."""
        groups: dict[str, list[str]] = {}
        for base in cls.__mro__:
            own = vars(base).get("__annotations__", {})
            if issubclass(base, Settings) and (keys := [key for key in own if key in cls.model_fields]):
                groups.setdefault(base.title, []).extend(keys)
        return groups

    @classmethod
    def flag(cls, key: str) -> str:
        """How the option is written on the command line: `--save-every`, or `DIR...` for an argument."""
        extra = cls.model_fields[key].json_schema_extra
        extra = extra if isinstance(extra, dict) else {}
        return str(extra.get("positional") or f"--{extra.get('flag', key)}".replace("_", "-"))

    @classmethod
    def is_positional(cls, key: str) -> bool:
        """Whether the command line takes the option without a flag."""
        return not cls.flag(key).startswith("--")

    def changed(self, *keys: str) -> list[str]:
        """The flags of those of `keys` that do not have their default."""
        fields = type(self).model_fields
        return [self.flag(key) for key in keys if getattr(self, key) != fields[key].get_default()]

    @model_validator(mode="before")
    @classmethod
    def _none_is_off(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        may_be_off = {key for key, field in cls.model_fields.items() if type(None) in get_args(field.annotation)}
        off = [key for key, value in values.items() if isinstance(value, str) and value.lower() == "none"]
        return values | dict.fromkeys(may_be_off & {*off})

    @model_validator(mode="after")
    def _one_of_each_is_given(self) -> Self:
        for keys in self.one_of:
            if not any(getattr(self, key) for key in keys):
                raise ValueError(f"{self.flag(keys[0])} (or {', '.join(map(self.flag, keys[1:]))}) is required")
        return self

    @classmethod
    def parse(cls, values: dict[str, Any], *, where: str, flags: Collection[str] | None = None) -> Self:
        """Validate `values`; raises one `UserError` for all problems.

        Args:
            values: by option name.
            where: the file and table that the values come from.
            flags: the names given on the command line, if this is one.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            from dpkd.core.option_errors import explain  # only now: most commands have no error

            raise explain(cls, error, values, where, flags) from None

    @classmethod
    def layered(cls, *layers: Mapping[str, Any]) -> dict[str, Any]:
        """Values by option name of several layers, such as a file and the flags; later ones override earlier ones."""
        return {key: value for layer in layers for key, value in layer.items()}

    def implied(self) -> Mapping[str, Any]:
        """The values that options have where a file leaves them out."""
        return {key: field.get_default() for key, field in type(self).model_fields.items()}

    def to_toml(self) -> str:
        """The resolved options as TOML, which has no null: None is left out, or "none" where it is not implied."""
        import tomli_w

        implied = self.implied()
        values = self.model_dump(mode="json")
        texts = {key: "none" for key, value in values.items() if value is None and implied[key] is not None}
        return tomli_w.dumps({key: value for key, value in (values | texts).items() if value is not None})


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dict; raises `UserError` if it is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("the config file is missing", where=path, advice="Give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"the config file is not TOML: {error}", where=path) from None
    except ValueError:
        raise UserError("a number of the config file has too many digits", where=path) from None
    except RecursionError:
        raise UserError("the config file is nested too deeply", where=path) from None
