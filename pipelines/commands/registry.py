"""The commands of `dpkd`, one row each. The command line, recipes, documents and tests read this list.

Importing it imports no command: a row names its options class and its function, which are imported when needed.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpkd.core.errors import UserError

if TYPE_CHECKING:
    from dpkd.core.settings import Settings


class Command(NamedTuple):
    """A command: its options are the fields of a class, and its work is one function.

    Attributes:
        name: as typed after `dpkd`; `cache info` is the command `info` of the group `cache`.
        about: one line for `--help`.
        options: the options class, as `module:class` of the package.
        function: takes the options and returns an exit code, a path to print, or None; as `module:function` of the
            package.
    """

    name: str
    about: str
    options: str
    function: str

    def options_class(self) -> type[Settings]:
        """The class whose fields are the options."""
        found: type[Settings] = _load(self.options)
        return found

    def run(self, config: Settings) -> int:
        """Run the command with validated options; the exit code. Raises whatever the command raises."""
        _refuse_memory(config)
        result: int | Path | None = _load(self.function)(config)
        if isinstance(result, Path):
            print(result)
            return 0
        return result or 0


def _refuse_memory(config: Settings) -> None:
    """Raise `UserError` for a folder in memory, which from Python is one, but not between commands."""
    for key, value in config:
        for item in value if isinstance(value, tuple | list) else (value,):
            if str(item).startswith("memory://"):
                raise UserError(
                    "a folder in memory is gone when the command ends",
                    found=str(item),
                    where=config.flag(key),
                    advice="Give a directory, or the URL of an object store",
                )


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(f"dpkd.{module}"), attribute)


_HERE, _CALLS = "pipelines.commands.options", "pipelines.commands.calls"

#: commands that a recipe can have as steps, in the order of a whole job; each has an `out`
STEPS = (
    Command(
        "prepare-data", "Select rows of instruction data by response length.",
        f"{_HERE}:PrepareConfig", "pipelines.commands.prepare:prepare_data",
    ),
    Command(
        "cache-teacher", "Cache the teacher's responses and distributions.",
        "teacher_cache.options.cache:CacheConfig", f"{_CALLS}:cache_teacher",
    ),
    Command(
        "cache import", "Make a cache of what another program has stored of a teacher.",
        "teacher_cache.options.derive:ImportConfig", f"{_CALLS}:import_stored",
    ),
    Command(
        "cache merge", "Merge caches of one tokenizer into a new one.",
        "teacher_cache.options.derive:CacheMergeConfig", f"{_CALLS}:merge_caches",
    ),
    Command(
        "cache filter", "Make a new cache of some rows of another.",
        "teacher_cache.options.derive:CacheFilterConfig", f"{_CALLS}:filter_cache",
    ),
    Command(
        "init-student", "Make a student from the teacher.",
        "distill.options.student:InitStudentConfig", "distill.student.init:init_student",
    ),
    Command(
        "train", "Train a student from a teacher cache, or on data.",
        "distill.options.train:TrainConfig", f"{_CALLS}:train_student",
    ),
    Command(
        "eval", "Evaluate models on data with references.",
        "evaluate.options.eval:EvalConfig", f"{_CALLS}:evaluate_models",
    ),
    Command(
        "report", "Merge evaluations into one report.",
        "evaluate.options.merge:MergeConfig", f"{_CALLS}:merge_reports",
    ),
    Command(
        "judge", "Let a judge model grade or compare answers.",
        "evaluate.options.judge:JudgeConfig", f"{_CALLS}:judge_answers",
    ),
    Command(
        "add-noise", "Copy a model with noise on its weights and measure the copies (Fig. 2).",
        f"{_HERE}:NoiseConfig", "pipelines.commands.noise:add_noise",
    ),
)  # fmt: skip

#: every command by name, in the order of `dpkd --help`
COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        *STEPS,
        Command(
            "serve-teacher", "Serve a cache's teacher with vLLM, for live student samples.",
            "teacher_cache.options.audit:ServeConfig", "teacher_cache.serve:serve_teacher",
        ),
        Command(
            "cache info", "Describe a cache.",
            "teacher_cache.options.audit:InfoOptions", f"{_CALLS}:describe",
        ),
        Command(
            "cache verify", "Verify the checksums and values of a cache and its rounds.",
            "teacher_cache.options.audit:VerifyOptions", f"{_CALLS}:verify",
        ),
        Command(
            "cache repair", "Make the bad shards of a finished cache and its rounds again.",
            "teacher_cache.options.audit:RepairOptions", f"{_CALLS}:repair",
        ),
        Command(
            "cache fidelity", "Compare a cache with its live teacher.",
            "teacher_cache.options.audit:FidelityConfig", f"{_CALLS}:compare_with_teacher",
        ),
        Command(
            "run", "Run a recipe step by step; finished steps are skipped.",
            f"{_HERE}:RunOptions", "pipelines.recipe.run:run",
        ),
        Command(
            "plan", "Print what a recipe costs, from a pilot of its steps.",
            f"{_HERE}:PlanOptions", "pipelines.planning.measure:run",
        ),
        Command(
            "recipes", "List the recipes that ship with dpkd, or print one.",
            f"{_HERE}:RecipesOptions", "pipelines.recipe.shipped:print_recipes",
        ),
        Command(
            "reproduce", "Make a table or figure of the paper from its recipe.",
            f"{_HERE}:ReproduceOptions", "pipelines.reproduce.reproduce:run",
        ),
    )
}  # fmt: skip
