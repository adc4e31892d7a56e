"""`dpkd reproduce`: runs the unfinished steps of a recipe, then makes a table or figure of the paper."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from dpkd.core.errors import UserError
from dpkd.core.plotting import require_matplotlib
from dpkd.core.progress import say
from dpkd.pipelines.planning.plan import plan_steps
from dpkd.pipelines.planning.text import plan_text
from dpkd.pipelines.recipe.format import read_recipe
from dpkd.pipelines.recipe.run import run_steps
from dpkd.pipelines.recipe.shipped import find_recipe, print_list, shipped_recipes
from dpkd.pipelines.reproduce.inputs import check_inputs, missing_inputs
from dpkd.pipelines.reproduce.options import ReproduceConfig, read_reproduce

if TYPE_CHECKING:
    from dpkd.pipelines.commands.options import ReproduceOptions


def run(options: ReproduceOptions) -> None:
    """The command: make the artefact and print its files, or print the plan; without a recipe, list those there are."""
    if options.recipe is None:
        say(f"recipes for {options.artefact}; choose one with --recipe NAME, and add --dry-run for its plan:")
        name = re.compile(rf"paper/{options.artefact}(-.*)?")
        print_list([recipe for recipe in shipped_recipes() if name.fullmatch(recipe)])
        return
    for path in reproduce(options.artefact, options.recipe, dry_run=options.dry_run):
        print(path)


def reproduce(artefact: str, recipe: str | Path, *, dry_run: bool = False) -> list[Path]:
    """Run the unfinished steps of `recipe` and write its table or figure; the files.

    With `dry_run`, print the plan and its cost and write nothing. Raises `UserError` for a recipe of another table or
    figure, and, before the first step, for all missing inputs.
    """
    steps = read_recipe(recipe)
    config = read_reproduce(find_recipe(recipe), steps)
    if config.artefact != artefact:
        raise UserError(
            "the recipe makes another table or figure",
            found=config.artefact,
            expected=artefact,
            where=recipe,
            advice=f"Run: dpkd reproduce {config.artefact} --recipe {recipe}",
        )
    if dry_run:
        print(plan_text(plan_steps(steps, config.assume)))
        missing = missing_inputs(steps, config)
        print(f"then {artefact} -> {config.out}")
        print(f"missing: {', '.join(missing)}" if missing else "none of the recipe's inputs is missing")
        if missing and config.assume:
            print("rows and parameters of missing inputs are the recipe's assumptions ([reproduce.assume])")
        return []
    check_inputs(steps, config)
    if artefact.startswith("fig"):
        require_matplotlib()
    run_steps(steps, str(recipe))
    return build_artefact(config, f"dpkd reproduce {artefact} --recipe {recipe}")


def build_artefact(config: ReproduceConfig, command: str) -> list[Path]:
    """Write the table or figure from existing outputs, with `command` in it; the files."""
    from dpkd.pipelines.reproduce import figures
    from dpkd.pipelines.reproduce.sources import how_made
    from dpkd.pipelines.reproduce.tables import build_table, to_markdown, write_table

    made = how_made(config, command)
    if config.artefact.startswith("table"):
        table = build_table(config, made)
        paths = write_table(table, config.out)
        print(to_markdown(table))
    elif config.artefact == "fig5":
        paths = figures.draw_buckets(config, build_table(config, made))
    else:
        draw = {
            "fig1": figures.draw_judge,
            "fig2": figures.draw_noise,
            "fig3": figures.draw_trajectory,
            "fig4": figures.draw_curves,
        }
        paths = draw[config.artefact](config, made)
    say(f"{config.artefact}: {', '.join(map(str, paths))}")
    return paths
