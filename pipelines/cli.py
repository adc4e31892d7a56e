"""The command `dpkd`: a typer app of the commands in the registry.

The options of a command are imported when it is named, so `dpkd --help` does not wait for them.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dpkd.core.errors import UserError
from dpkd.core.option_errors import did_you_mean
from dpkd.core.progress import say
from dpkd.pipelines.commands.registry import COMMANDS
from dpkd.pipelines.process import EXIT_INVALID, run_process

_ABOUT = "Distil a large language model into a small one without keeping the large one in memory."
_CODES = (
    "Exit codes: 0 success; 1 internal error (traceback path printed); 2 invalid input or options; 3 finished, but "
    "some rows failed, an alarm stopped training or a budget was spent; 130 interrupted."
)


class CommandGroup(TyperGroup):
    """Suggests a name for a misspelt command; lists `cache info` as such in `dpkd --help`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As typer does, but the error of an unknown command is one line with one suggestion."""
        if not args[0].startswith("-") and args[0] not in self.commands:
            advice = did_you_mean(args[0], [*self.commands]) or f"See {ctx.command_path} --help"
            raise UserError(f"unknown command {args[0]}", advice=advice)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a line per command, from the registry alone."""
        group = "" if ctx.parent is None else f"{self.name} "
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name.removeprefix(group), row.about) for name, row in COMMANDS.items() if name.startswith(group)]
            )


def make_app(arguments: Sequence[str]) -> typer.Typer:
    """The command line, with the options of the command that `arguments` name; the others are names only."""
    app = _group("dpkd", _ABOUT, _CODES)
    app.callback()(_root)
    groups = {"": app}
    for name, command in COMMANDS.items():
        group, _, leaf = name.rpartition(" ")
        if group not in groups:
            groups[group] = _group(group, f"Commands on a teacher {group}.")
            app.add_typer(groups[group], name=group)
        if name.split() == list(arguments[: len(name.split())]):
            from dpkd.pipelines.flags import add_command  # `dpkd --help` needs no pydantic

            add_command(groups[group], leaf, command)
        else:
            groups[group].command(leaf)(_not_called)
    return app


def _group(name: str, about: str, epilog: str | None = None) -> typer.Typer:
    return typer.Typer(
        name=name,
        cls=CommandGroup,
        help=about,
        epilog=epilog,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


def _not_called() -> None:
    """Stands for a command that the command line does not name."""


def _print_version(asked: bool) -> None:
    if asked:
        print(f"dpkd {version('dpkd')}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the command `dpkd`."""
    sys.exit(run_process(lambda: run(sys.argv[1:]), shlex.join(["dpkd", *sys.argv[1:]])))


def run(arguments: Sequence[str]) -> int:
    """Run `dpkd` with `arguments` in this process; the exit code. Raises whatever the command raises."""
    app = typer.main.get_command(make_app(arguments))
    try:
        # not `app.main`, which turns Ctrl-C and errors into messages of its own
        with app.make_context("dpkd", list(arguments)) as context:
            return app.invoke(context) or 0
    except typer.Exit as end:
        return end.exit_code
    except typer.TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            say(error.format_message())
            return EXIT_INVALID
        raise _problem(error) from None


def _problem(error: Any) -> UserError:
    if type(error).__name__ != "NoSuchOption":
        return UserError(error.format_message().rstrip("."))
    known = [flag for parameter in error.ctx.command.params for flag in parameter.opts]
    advice = did_you_mean(error.option_name, known) or f"See {error.ctx.command_path} --help"
    return UserError(f"unknown option {error.option_name}", advice=advice)


if __name__ == "__main__":
    main()
