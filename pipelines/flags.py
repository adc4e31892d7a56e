"""From a command line to a typed config: flags for the fields of an options class, a TOML file, `--set key=value`."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand

from dpkd.core.errors import UserError
from dpkd.core.progress import say
from dpkd.core.settings import Metavar, Settings, read_toml
from dpkd.pipelines.commands.registry import Command

#: a description may begin with the form of the value, `NAME=DIR: `
_FORM = re.compile(r"(?:([A-Z]+=[\w.]+): )?(.*)", re.DOTALL)
#: where help texts begin, and the longest list of choices to show as the value, in characters
_TEXT_COLUMN, _LONG_CHOICE = 26, 50
#: options of every command whose other options can come from a file: type, declaration, default
_GENERAL: dict[str, tuple[Any, Any, Any]] = {
    "config": (
        str | None,
        typer.Option("--config", metavar="FILE", help="TOML file of these options; flags override it"),
        None,
    ),
    "set": (
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="an option by its TOML name; repeatable"),
        None,
    ),
    "dry_run": (bool, typer.Option("--dry-run", help="print the resolved options and stop"), False),
}


class OptionsCommand(TyperCommand):
    """A command whose flags are the fields of `options`, listed by group in `--help`."""

    options: ClassVar[type[Settings]]

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Name the arguments as `--help` lists them; optional ones have brackets there."""
        return [
            "[OPTIONS]",
            *(self.options.flag(key) for key in self.options.model_fields if self.options.is_positional(key)),
        ]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write each group of options under its title, with defaults."""
        parameters: dict[str, Any] = {str(parameter.name): parameter for parameter in self.get_params(ctx)}
        groups = {
            title: [_help(self.options, parameters.pop(key), key) for key in keys]
            for title, keys in self.options.groups().items()
        }
        records = [
            (f"{', '.join(item.opts)} {item.metavar or ''}".rstrip(), str(item.help)) for item in parameters.values()
        ]
        groups.setdefault("Every command" if len(records) > 1 else "Options", []).extend(records)
        for title, rows in groups.items():
            with formatter.section(title):
                for spelled, text in rows:
                    _write_row(formatter, spelled, text)


def add_command(app: typer.Typer, name: str, command: Command) -> None:
    """Add `command` to `app` under `name`, with a flag for each field of its options class."""
    options = command.options_class()

    def call(**given: Any) -> int:
        if not options.from_files:
            return command.run(resolve(options, given))
        path, settings = given.pop("config"), given.pop("set")
        dry_run = "dry_run" not in options.model_fields and given.pop("dry_run")
        config = resolve(options, given, path, tuple(settings or ()))
        if not dry_run:
            return command.run(config)
        say(f"the options of dpkd {command.name} (nothing is run):")
        print(config.to_toml(), end="")
        return 0

    declared = {key: (*_declaration(options, key), None) for key in options.model_fields}
    if options.from_files:
        declared = _GENERAL | declared
    parameters = [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, declaration])
        for key, (kind, declaration, default) in declared.items()
    ]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(
        name,
        cls=type("OptionsCommand", (OptionsCommand,), {"options": options}),
        help=f"{command.about}\n\n\b\nExample:\n  {options.example}",
        context_settings={"max_content_width": 100},
    )(call)


def _write_row(formatter: Any, spelled: str, text: str) -> None:
    """As the formatter's `write_dl`, but without line breaks inside `--flags`."""
    first, indent = f"{spelled:<{_TEXT_COLUMN}}", " " * (_TEXT_COLUMN + formatter.current_indent)
    width = formatter.width - len(indent)
    lines = textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)
    if len(spelled) > _TEXT_COLUMN - 2:
        first, lines = spelled, ["", *lines]
    formatter.write(f"{' ' * formatter.current_indent}{first}{lines[0]}".rstrip() + "\n")
    formatter.write("".join(f"{indent}{line}\n" for line in lines[1:]))


def _declaration(options: type[Settings], key: str) -> tuple[Any, Any]:
    """Type and typer's declaration of a field. All but switches take text: flags, TOML and --set give equal errors."""
    annotation, flag = options.model_fields[key].annotation, options.flag(key)
    kind: Any = list[str] | None if _is_repeatable(annotation) else str | None
    if options.is_positional(key):
        return kind, typer.Argument(metavar=flag, show_default=False)
    if annotation is bool or bool in get_args(annotation):
        return bool | None, typer.Option(f"{flag}/--no-{flag[2:]}")
    return kind, typer.Option(flag)


def _is_repeatable(annotation: Any) -> bool:
    """Whether it is a dict or several texts; several numbers are one text with commas."""
    several = [kind for kind in (annotation, *get_args(annotation)) if get_origin(kind) is tuple]
    return get_origin(annotation) is dict or any(_is_text(get_args(kind)[0]) for kind in several)


def _is_text(annotation: Any) -> bool:
    return annotation is str or (get_origin(annotation) is Annotated and get_args(annotation)[0] is str)


def _help(options: type[Settings], parameter: Any, key: str) -> tuple[str, str]:
    """How to write the option, and its help text with the default."""
    field = options.model_fields[key]
    form, text = _FORM.match(str(field.description)).groups()  # type: ignore[union-attr]
    spelled = " / ".join([*parameter.opts, *parameter.secondary_opts])
    if options.is_positional(key):
        spelled = options.flag(key)
    elif not parameter.secondary_opts:
        spelled += f" {form or _metavar(field.annotation, field.metadata)}"
    choices = _choices(field.annotation)
    if len("|".join(choices)) > _LONG_CHOICE:
        text += f"; one of {', '.join(choices)}"
    return spelled, f"{text} [{'required' if field.is_required() else f'default: {_default(field.default)}'}]"


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (tuple, dict)):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _choices(annotation: Any) -> list[str]:
    """The texts that an option can have, if they are few; for `Literal[...]`, and in a union with other types."""
    return [
        str(choice)
        for kind in (annotation, *get_args(annotation))
        if get_origin(kind) is Literal
        for choice in get_args(kind)
    ]


def _metavar(annotation: Any, metadata: list[Any]) -> str:
    if get_origin(annotation) is dict:
        return "NAME=VALUE"
    of_parts = (mark for kind in get_args(annotation) for mark in getattr(kind, "__metadata__", ()))
    if form := next((mark for mark in (*metadata, *of_parts) if isinstance(mark, Metavar)), None):
        return form
    if choices := "|".join(_choices(annotation)):
        return choices if len(choices) <= _LONG_CHOICE else "NAME"
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not type(None)]
    return {int: "N", float: "X", Path: "PATH"}.get(kinds[0], "TEXT")


def resolve(
    options: type[Settings], given: Mapping[str, Any], path: str | None = None, settings: tuple[str, ...] = ()
) -> Settings:
    """The config of flags (None: not given), a TOML file and `key=value` settings; raises `UserError`.

    Flags and settings override the file, and the file overrides the defaults.
    """
    values = {} if path is None else read_toml(Path(path))
    flags = {key: value for key, value in given.items() if value not in (None, (), [])}
    for setting in settings:
        key, equals, value = setting.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UserError("--set takes KEY=VALUE", found=repr(setting))
        if key in flags:
            raise UserError(f"{key} is given twice, as a flag and by --set")
        flags[key] = value.strip()
    return options.parse(options.layered(values, flags), where=path or "the command line", flags=flags)
