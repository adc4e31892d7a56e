"""Recipes that ship with dpkd: found by name in any working directory, listed with the first line of each file."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from dpkd.core.errors import UserError
from dpkd.core.option_errors import did_you_mean

if TYPE_CHECKING:
    from dpkd.pipelines.commands.options import RecipesOptions


@cache
def shipped_recipes() -> dict[str, Path]:
    """Every shipped recipe by name: `quickstart`, `paper/table1-tiny`, ..."""
    folder = _recipes_folder()
    paths = sorted(folder.rglob("*.toml"), key=lambda path: (len(path.relative_to(folder).parts), path))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def find_recipe(name: str | Path) -> Path:
    """The file of a shipped recipe, or `name` itself as the path of a TOML file; raises `UserError` for neither."""
    shipped = shipped_recipes()
    if str(name) in shipped:
        return shipped[str(name)]
    if Path(name).suffix == ".toml" or Path(name).is_file():
        return Path(name)
    raise UserError(
        "no recipe has this name",
        found=repr(str(name)),
        expected="a name that `dpkd recipes` lists, or the path of a TOML file",
        advice=did_you_mean(str(name), shipped),
    )


def print_recipes(options: RecipesOptions) -> None:
    """Print the TOML of one recipe, or a line for each shipped one: its name and what it does."""
    if options.recipe is not None:
        print(find_recipe(options.recipe).read_text(encoding="utf-8").rstrip())
        return
    print_list(list(shipped_recipes()))


def print_list(names: list[str]) -> None:
    """Print a line for each of these shipped recipes: its name and what it does."""
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {_first_line(shipped_recipes()[name])}")


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def shipped_folders() -> dict[str, str]:
    """Values of the placeholders {recipes} and {examples}: relative where the folder is in the working directory.

    A relative path keeps the saved options of a run the same in every clone.
    """
    recipes = _recipes_folder()
    return {folder.name: _shortest(folder) for folder in (recipes, recipes.parent / "examples")}


def _recipes_folder() -> Path:
    # the folders of a clone are linked into the package in development: `examples` is next to the real folder
    return Path(str(files("dpkd.recipes"))).resolve()


def _shortest(folder: Path) -> str:
    here = Path.cwd().resolve()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
