"""From a command line to a typed config: flags for the fields of an options class, a TOML file, `--set key=value`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from dpkd.core.errors import UserError
from dpkd.core.option_errors import did_you_mean
from dpkd.core.progress import say
from dpkd.core.settings import Location, Settings, read_toml
from dpkd.pipelines.commands.registry import Command

_WIDTH = {"max_content_width": 100}
#: where help texts begin, and the longest list of choices to show as the value, in characters
_TEXT_COLUMN, _LONG_CHOICE = 26, 50
#: options of every command that has no `dry_run` of its own
_GENERAL = (
    click.Option(["--config"], metavar="FILE", help="TOML file of these options; flags override it"),
    click.Option(["--set"], metavar="KEY=VALUE", multiple=True, help="an option by its TOML name; repeatable"),
    click.Option(["--dry-run"], is_flag=True, help="print the resolved options and stop"),
)


class OptionsCommand(click.Command):
    """A command whose flags are the fields of its options class, listed by group in `--help`."""

    def __init__(self, command: Command) -> None:
        self._command, self._options = command, command.options_class()
        general = [] if "dry_run" in self._options.model_fields else [*_GENERAL]
        super().__init__(
            command.name,
            params=[*(_parameter(self._options, key) for key in self._options.model_fields), *general],
            help=f"{command.about}\n\n\b\nExample:\n  {self._options.example}",
            context_settings=_WIDTH,
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, but a misspelt flag gets one suggestion."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            known = [flag for parameter in self.params for flag in parameter.opts]
            advice = did_you_mean(error.option_name, known) or f"See dpkd {self.name} --help"
            raise UserError(f"unknown option {error.option_name}", advice=advice) from None

    def invoke(self, ctx: click.Context) -> int:
        """Run the command with the options of the command line; the exit code."""
        given = dict(ctx.params)
        if "dry_run" in self._options.model_fields:
            return self._command.run(resolve(self._options, given))
        path, settings, dry_run = given.pop("config"), given.pop("set"), given.pop("dry_run")
        config = resolve(self._options, given, path, settings)
        if not dry_run:
            return self._command.run(config)
        say(f"the options of dpkd {self.name} (nothing is run):")
        print(config.to_toml(), end="")
        return 0

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each group of options under its title, with defaults."""
        parameters = {parameter.name: parameter for parameter in self.get_params(ctx)}
        groups = {
            title: [_help(self._options, parameters.pop(key), key) for key in keys]
            for title, keys in self._options.groups().items()
        }
        records = [parameter.get_help_record(ctx) for parameter in parameters.values()]
        groups.setdefault("Every command" if len(records) > 1 else "Options", []).extend(filter(None, records))
        for title, rows in groups.items():
            with formatter.section(title):
                for spelled, text in rows:
                    _write_row(formatter, spelled, text)


def _write_row(formatter: click.HelpFormatter, spelled: str, text: str) -> None:
    """As click's `write_dl`, but without line breaks inside `--flags`."""
    first, indent = f"{spelled:<{_TEXT_COLUMN}}", " " * (_TEXT_COLUMN + formatter.current_indent)
    width = formatter.width - len(indent)
    lines = textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)
    if len(spelled) > _TEXT_COLUMN - 2:
        first, lines = spelled, ["", *lines]
    formatter.write(f"{' ' * formatter.current_indent}{first}{lines[0]}".rstrip() + "\n")
    formatter.write("".join(f"{indent}{line}\n" for line in lines[1:]))


def _parameter(options: type[Settings], key: str) -> click.Parameter:
    """The parameter of a field. All but switches take text, so that flags, TOML and --set give the same errors."""
    annotation, flag = options.model_fields[key].annotation, options.flag(key)
    repeatable = get_origin(annotation) is dict or annotation == tuple[str, ...]
    if options.is_positional(key):
        return click.Argument([key], nargs=-1 if repeatable else 1, required=False, metavar=flag)
    if annotation is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}", key], default=None)
    return click.Option([flag, key], multiple=repeatable, type=str)


def _help(options: type[Settings], parameter: click.Parameter, key: str) -> tuple[str, str]:
    """How to write the option, and its help text with the default."""
    field = options.model_fields[key]
    spelled = " / ".join([*parameter.opts, *parameter.secondary_opts])
    if options.is_positional(key):
        spelled = options.flag(key)
    elif field.annotation is not bool:
        spelled += f" {_metavar(field.annotation, field.metadata)}"
    text, choices = str(field.description), _choices(field.annotation)
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
    if get_args(Location)[1] in metadata or Location in get_args(annotation):
        return "PATH|URL"
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
    flags = {key: value for key, value in given.items() if value not in (None, ())}
    for setting in settings:
        key, equals, value = setting.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UserError("--set takes KEY=VALUE", found=repr(setting))
        if key in flags:
            raise UserError(f"{key} is given twice, as a flag and by --set")
        flags[key] = value.strip()
    return options.parse(values | flags, where=path or "the command line", flags=flags)
