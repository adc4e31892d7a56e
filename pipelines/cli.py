"""The command `dpkd`: a group of the commands in the registry.

A command's options are imported when it is named, so `dpkd --help` does not wait for them.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence

import click

from dpkd.core.errors import UserError
from dpkd.core.option_errors import did_you_mean
from dpkd.core.progress import say
from dpkd.pipelines.commands.registry import COMMANDS, Command
from dpkd.pipelines.process import EXIT_INVALID, run_process

_ABOUT = "Distil a large language model into a small one without keeping the large one in memory."
_CODES = (
    "Exit codes: 0 success; 1 internal error (traceback path printed); 2 invalid input or options; 3 finished, some "
    "rows failed; 130 interrupted."
)


class CommandGroup(click.Group):
    """Commands by name, loaded when they are called; `cache info` is `info` in the group `cache`."""

    def __init__(self, name: str, rows: Mapping[str, Command], about: str, epilog: str | None = None) -> None:
        super().__init__(name, help=about, epilog=epilog, no_args_is_help=True)
        self._rows = rows

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands and groups, in the order of the registry."""
        return list(dict.fromkeys(name.partition(" ")[0] for name in self._rows))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command or the group of that name; None if there is none."""
        if cmd_name in self._rows:
            from dpkd.pipelines.flags import OptionsCommand  # `dpkd --help` needs no pydantic

            return OptionsCommand(self._rows[cmd_name])
        prefix = f"{cmd_name} "
        inner = {name.removeprefix(prefix): row for name, row in self._rows.items() if name.startswith(prefix)}
        return CommandGroup(cmd_name, inner, f"Commands on a teacher {cmd_name}.") if inner else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but a misspelt command gets one suggestion."""
        if not args[0].startswith("-") and args[0] not in (known := self.list_commands(ctx)):
            advice = did_you_mean(args[0], known) or f"See {ctx.command_path} --help"
            raise UserError(f"unknown command {args[0]}", advice=advice)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a line per command, from the registry alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, row.about) for name, row in self._rows.items()])


app = CommandGroup("dpkd", COMMANDS, _ABOUT, _CODES)
click.version_option(package_name="dpkd", message="dpkd %(version)s", help="Print the version and exit.")(app)


def main() -> None:
    """Entry point of the command `dpkd`."""
    sys.exit(run_process(lambda: run(sys.argv[1:]), shlex.join(["dpkd", *sys.argv[1:]])))


def run(arguments: Sequence[str]) -> int:
    """Run `dpkd` with `arguments` in this process; the exit code. Raises whatever the command raises."""
    try:
        with app.make_context("dpkd", list(arguments)) as context:
            code: int = app.invoke(context)
            return code
    except click.exceptions.NoArgsIsHelpError as page:
        say(page.message)
        return EXIT_INVALID
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.UsageError as error:
        raise UserError(error.format_message().rstrip(".")) from None


if __name__ == "__main__":
    main()
