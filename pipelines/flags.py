"""From a command line to a typed config: flags made from the config's fields, a TOML file, `--set key=value`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from dpkd.core.errors import UserError
from dpkd.core.progress import say
from dpkd.core.settings import Location, Settings, read_toml


def config_command(
    app: typer.Typer, name: str, config_type: type[Settings], run: Callable[[Any], None], *, about: str
) -> None:
    """Add the command `name`: one flag a field of `config_type`, and `run` called with the config.

    Precedence: defaults, then the TOML file, then flags and `--set` (a key given both ways is an error).
    """

    def command(**given: Any) -> None:
        config_path, settings, dry_run = given.pop("config"), given.pop("set"), given.pop("dry_run")
        config = resolve(config_type, given, config_path, settings or [])
        if dry_run:
            say(f"dpkd {name}, resolved (nothing is run):")
            print(config.to_toml(), end="")
            return
        run(config)

    parameters = [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for key, annotation in _flags(config_type).items()
    ]
    parameters += [
        _parameter("config", Path | None, typer.Option("--config", help="TOML file of these options", metavar="FILE")),
        _parameter("set", list[str] | None, typer.Option("--set", help="an option as key=value", metavar="KEY=VALUE")),
        _parameter("dry_run", bool, typer.Option("--dry-run", help="print the resolved options and stop"), False),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    further = ", ".join(sorted(config_type.set_only))
    text = about + (f"\n\nFurther options by --set: {further}." if further else "")
    app.command(name, help=text, short_help=about)(command)


def _parameter(name: str, kind: Any, option: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _flags(config_type: type[Settings]) -> dict[str, Any]:
    """Every flag but a switch takes text: pydantic reads it, so that flags, TOML and --set give the same errors."""
    flags = {}
    for key, field in config_type.model_fields.items():
        if key in config_type.set_only:
            continue
        named = get_origin(field.annotation) is dict
        repeatable = named or field.annotation == tuple[str, ...]
        is_switch = field.annotation is bool
        kind = (list[str] if repeatable else bool if is_switch else str) | None
        default = "" if field.is_required() or field.default in (None, (), {}) else f" [{_shown(field.default)}]"
        if isinstance(field.json_schema_extra, dict) and "positional" in field.json_schema_extra:
            metavar = str(field.json_schema_extra["positional"])
            flags[key] = Annotated[list[str] | None, typer.Argument(help=field.description, metavar=metavar)]
            continue
        # an option whose flag cannot be the field's own name says so
        name = (field.json_schema_extra or {}).get("flag", key) if not callable(field.json_schema_extra) else key
        flag = f"--{str(name).replace('_', '-')}"
        option = typer.Option(
            f"{flag}/--no-{flag[2:]}" if is_switch else flag,
            help=(field.description or "") + default,
            metavar=None if is_switch else "NAME=VALUE" if named else _metavar(field.annotation, field.metadata),
            show_default=False,
        )
        flags[key] = Annotated[kind, option]
    return flags


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _metavar(annotation: Any, metadata: list[Any]) -> str:
    if get_args(Location)[1] in metadata or Location in get_args(annotation):
        return "PATH|URL"
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not type(None)]
    if get_origin(kinds[0]) is Literal:
        return "|".join(map(str, get_args(kinds[0])))
    return {int: "N", float: "X", Path: "PATH", bool: "true|false"}.get(kinds[0], "TEXT")


def resolve(config_type: type[Settings], given: dict[str, Any], config_path: Path | None, settings: list[str]) -> Any:
    """The config of flags (None: not given), TOML file and `key=value` settings; raises `UserError`."""
    values: dict[str, Any] = {} if config_path is None else read_toml(config_path)
    if config_path is not None:
        config_type.parse_known(values, where=str(config_path))
    flags = {key: value for key, value in given.items() if value is not None}
    for setting in settings:
        key, equals, value = setting.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UserError("--set takes KEY=VALUE", found=repr(setting), where="the command line")
        if key in flags:
            raise UserError(f"option {key!r} is given twice, as a flag or --set", where="the command line")
        flags[key] = value.strip()
    where = "the command line" if config_path is None else f"{config_path} and the command line"
    return config_type.parse(values | flags, where=where)
