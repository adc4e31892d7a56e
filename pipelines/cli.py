"""The command `dpkd`: each command is a thin shell over one public function.

A command's options are imported when that command is named: `dpkd --help` and the other commands do not wait for them.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from dpkd.pipelines.process import EXIT_SET_ASIDE, run_process

if TYPE_CHECKING:
    from dpkd.distill.options.student import InitStudentConfig
    from dpkd.distill.options.train import TrainConfig
    from dpkd.evaluate.options.eval import EvalConfig
    from dpkd.evaluate.options.judge import JudgeConfig
    from dpkd.evaluate.options.merge import MergeConfig
    from dpkd.pipelines.commands.noise_options import NoiseConfig
    from dpkd.pipelines.commands.prepare_options import PrepareConfig
    from dpkd.teacher_cache.options.cache import CacheConfig
    from dpkd.teacher_cache.options.fidelity import FidelityConfig
    from dpkd.teacher_cache.options.serve import ServeConfig


def _prepare_data(config: PrepareConfig) -> None:
    from dpkd.pipelines.commands.prepare import prepare_data

    print(prepare_data(config))


def _build_cache(config: CacheConfig) -> None:
    from dpkd.teacher_cache.build.cache import build_cache

    manifest = build_cache(config)
    print(config.out)
    if manifest.failed:
        raise typer.Exit(EXIT_SET_ASIDE)


def _init_student(config: InitStudentConfig) -> None:
    from dpkd.distill.student.init import init_student

    print(init_student(config))


def _add_noise(config: NoiseConfig) -> None:
    from dpkd.pipelines.commands.noise import add_noise

    print(add_noise(config))


def _train(config: TrainConfig) -> None:
    from dpkd.distill.training import train

    evaluate_fn = None
    if config.best_metric == "rouge_l":
        from dpkd.pipelines.bridges import rouge_l_evaluator

        evaluate_fn = rouge_l_evaluator(config)
    run = train(config, evaluate_fn)
    if os.environ.get("RANK", "0") == "0":  # one of several processes names the result
        print(run)


def _serve_teacher(config: ServeConfig) -> None:
    from dpkd.teacher_cache.serve import serve_teacher

    serve_teacher(config)


def _evaluate(config: EvalConfig) -> None:
    from dpkd.evaluate.evaluation import evaluate
    from dpkd.evaluate.views.terminal import print_report

    path = evaluate(config)
    print_report(json.loads(path.read_text(encoding="utf-8")))
    print(f"report: {path}")


def _report(config: MergeConfig) -> None:
    from dpkd.evaluate.merge.merge import merge
    from dpkd.evaluate.views.terminal import print_report

    path = merge(config)
    print_report(json.loads(path.read_text(encoding="utf-8")))
    print(f"report: {path}")


def _judge(config: JudgeConfig) -> None:
    from dpkd.evaluate.judge.judge import estimate, judge
    from dpkd.evaluate.judge.markdown import judge_markdown
    from dpkd.evaluate.judge.tokens import estimate_text

    if config.estimate:
        print(estimate_text(estimate(config)))
        return
    path = judge(config)
    report = json.loads(path.read_text(encoding="utf-8"))
    print(judge_markdown(report))
    print(f"report: {path}")
    if report["refused"]:
        raise typer.Exit(EXIT_SET_ASIDE)


def _measure_fidelity(config: FidelityConfig) -> None:
    from dpkd.teacher_cache.audit.fidelity import fidelity_table, measure_fidelity

    report = measure_fidelity(config)
    print(json.dumps(report, indent=2, ensure_ascii=False) if config.as_json else fidelity_table(report))


class ConfigCommand(NamedTuple):
    """A command whose flags are the fields of a config."""

    name: str
    config: str  # module:class
    run: Callable[[Any], None]
    about: str


COMMANDS = (
    ConfigCommand(
        "prepare-data",
        "dpkd.pipelines.commands.prepare_options:PrepareConfig",
        _prepare_data,
        "Keep rows by the length of their response.",
    ),
    ConfigCommand(
        "cache-teacher",
        "dpkd.teacher_cache.options.cache:CacheConfig",
        _build_cache,
        "Ask the teacher once and keep the answer.",
    ),
    ConfigCommand("init-student", "dpkd.distill.options.student:InitStudentConfig", _init_student, "Make a student."),
    ConfigCommand(
        "add-noise",
        "dpkd.pipelines.commands.noise_options:NoiseConfig",
        _add_noise,
        "Copy a model with noise on its weights (Fig. 2).",
    ),
    ConfigCommand("train", "dpkd.distill.options.train:TrainConfig", _train, "Train a student from a cache."),
    ConfigCommand(
        "serve-teacher",
        "dpkd.teacher_cache.options.serve:ServeConfig",
        _serve_teacher,
        "Serve a cache's teacher by vLLM, for live runs.",
    ),
    ConfigCommand("eval", "dpkd.evaluate.options.eval:EvalConfig", _evaluate, "Score models by length bucket."),
    ConfigCommand("report", "dpkd.evaluate.options.merge:MergeConfig", _report, "Merge evaluations into one report."),
    ConfigCommand(
        "judge",
        "dpkd.evaluate.options.judge:JudgeConfig",
        _judge,
        "Have a judge model grade answers, or compare them.",
    ),
)
CACHE_COMMANDS = (
    ConfigCommand(
        "fidelity",
        "dpkd.teacher_cache.options.fidelity:FidelityConfig",
        _measure_fidelity,
        "Hold a cache against its live teacher.",
    ),
)


def run_command(
    recipe: Annotated[str, typer.Argument(help="a name that `dpkd recipes` lists, or a TOML file", metavar="RECIPE")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="a value of the recipe's [inputs]", metavar="NAME=VALUE")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
) -> None:
    """Run a recipe: its steps in order, each its own process, each skipped when already complete."""
    from dpkd.pipelines.recipe.run import run_recipe

    run_recipe(recipe, settings or [], dry_run=dry_run)


def recipes_command(
    recipe: Annotated[str | None, typer.Argument(help="print this recipe's TOML", metavar="RECIPE")] = None,
) -> None:
    """List the recipes that ship with dpkd, or print one."""
    from dpkd.pipelines.recipe.shipped import find_recipe, recipe_list

    print(recipe_list() if recipe is None else find_recipe(recipe).read_text(encoding="utf-8").rstrip())


def reproduce_command(
    artefact: Annotated[str, typer.Argument(help="table1 to table5 or fig1 to fig5", metavar="ARTEFACT")],
    recipe: Annotated[
        str, typer.Option("--recipe", help="a recipe that `dpkd recipes` lists under paper/", metavar="RECIPE")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and its cost and stop")] = False,
) -> None:
    """Make a table or figure of the paper: the steps of its recipe that are missing, then the artefact."""
    from dpkd.pipelines.reproduce.reproduce import reproduce

    for path in reproduce(artefact, recipe, dry_run=dry_run):
        print(path)


def info_command(
    location: Annotated[str, typer.Argument(help="directory or URL of a finished cache", metavar="CACHE")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    samples: Annotated[int, typer.Option("--samples", min=0, help="rows of each origin to show")] = 3,
) -> None:
    """Say what a cache holds."""
    from dpkd.teacher_cache.audit.info import describe_cache

    facts = describe_cache(location, samples)
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _print_facts(facts)


def _print_facts(facts: dict[str, Any], indent: str = "") -> None:
    for key, value in facts.items():
        if key == "response_lengths":
            _print_histogram(value, indent)
        elif isinstance(value, dict) and value:
            print(f"{indent}{key}:")
            _print_facts(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for place, item in enumerate(value, start=1):
                print(f"{indent}{key} {place} of {len(value)}:")
                _print_facts(item, indent + "  ")
        elif value not in (None, [], (), {}):
            print(f"{indent}{key}: {f'{value:.4g}' if isinstance(value, float) else _one_line(value)}")


def _one_line(value: object) -> str:
    """Text of a model can hold control characters: they are shown, not obeyed."""
    return repr(value)[1:-1] if isinstance(value, str) and not value.isprintable() else str(value)


def _print_histogram(bins: dict[str, int], indent: str) -> None:
    print(f"{indent}response_lengths (tokens: rows):")
    most = max(bins.values(), default=1)
    for name, count in bins.items():
        print(f"{indent}  {name:>12} {count:>8} {'#' * round(40 * count / most)}")


def verify_command(
    location: Annotated[str, typer.Argument(help="directory or URL of a finished cache", metavar="CACHE")],
) -> None:
    """Check checksums and every value of a cache and its rounds."""
    from dpkd.teacher_cache.audit.verify import verify_cache

    counts = verify_cache(location)
    print(f"{location}: sound: {counts['rows']} rows in {counts['shards']} shards, {counts['rounds']} rounds")


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"dpkd {version('dpkd')}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and stop")
    ] = False,
) -> None:
    """Distil a large language model into a small one without keeping the large one in memory."""


def _add(app: typer.Typer, command: ConfigCommand, *, with_flags: bool) -> None:
    if not with_flags:
        app.command(command.name, short_help=command.about)(_never_called)
        return
    from dpkd.pipelines.flags import config_command

    module, _, name = command.config.partition(":")
    config_type = getattr(importlib.import_module(module), name)
    config_command(app, command.name, config_type, command.run, about=command.about)


def _never_called() -> None:
    """A command that another one stands beside in the list of `--help`."""


def make_app(arguments: Sequence[str] | None = None) -> typer.Typer:
    """The command line: with the flags of the command that `arguments` name, or of all of them (None)."""
    named = None if arguments is None else next((text for text in arguments if not text.startswith("-")), "")
    app = typer.Typer(
        name="dpkd",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    cache_app = typer.Typer(
        help="Look at, verify and measure a teacher cache.", no_args_is_help=True, rich_markup_mode=None
    )
    app.callback()(_root)
    app.add_typer(cache_app, name="cache")
    for command in COMMANDS:
        _add(app, command, with_flags=named in (None, command.name))
    for command in CACHE_COMMANDS:
        _add(cache_app, command, with_flags=named in (None, "cache"))
    app.command("run", short_help="Run a recipe, step by step.")(run_command)
    app.command("recipes", short_help="List the recipes that ship with dpkd.")(recipes_command)
    app.command("reproduce", short_help="Make a table or figure of the paper from its recipe.")(reproduce_command)
    cache_app.command("info")(info_command)
    cache_app.command("verify")(verify_command)
    return app


def main() -> None:
    """Entry point of the command `dpkd`."""
    sys.exit(run_process(_run_app))


def _run_app() -> object:
    """Run typer without its own exit, so that exit statuses are decided in one place."""
    return typer.main.get_command(make_app(sys.argv[1:])).main(standalone_mode=False)


if __name__ == "__main__":
    main()
