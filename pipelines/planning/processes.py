"""What a pilot runs in processes of their own, and the small data files that it runs on."""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from dpkd.core.errors import UserError
from dpkd.core.prompts.examples import Example
from dpkd.core.prompts.sources import open_examples, raw_rows
from dpkd.core.settings import Settings
from dpkd.evaluate.options.eval import EvalConfig
from dpkd.pipelines.commands.registry import COMMANDS
from dpkd.pipelines.recipe.forking import forking_context, obey_parent
from dpkd.teacher_cache.build.pilot import even_indices
from dpkd.teacher_cache.options.cache import CacheConfig

if TYPE_CHECKING:
    from dpkd.teacher_cache.build.cost import CacheCost

Result = TypeVar("Result")


def spread(data: str, limit: int | None, path: Path, most: int) -> None:
    """Write at most `most` rows of `data`, spread evenly over the first `limit`, to `path`."""
    rows = [row for number, row in raw_rows(open_examples(data)) if limit is None or number <= limit]
    wanted = even_indices(len(rows), most)
    path.write_text("".join(json.dumps(rows[i]) + "\n" for i in wanted), encoding="utf-8")


def timed(command: str, config: Settings) -> float:
    """Run a command; its seconds."""
    started_s = time.monotonic()
    COMMANDS[command].run(config)
    return time.monotonic() - started_s


def estimate(config: CacheConfig, num_rows: int | None) -> CacheCost:
    """The cost of a cache, or of a round with `num_rows`."""
    from dpkd.teacher_cache.build.estimate import estimate_cost

    return estimate_cost(config, num_rows=num_rows, live=False)


def write_eval_rows(config: EvalConfig, path: Path) -> None:
    """The rows of all sets as a data file of `cache-teacher`."""
    from dpkd.evaluate.inputs.eval_sets import read_eval_sets
    from dpkd.evaluate.inputs.models import open_candidates

    sets = read_eval_sets(config, open_candidates(config))
    examples = [(one.name, example) for one in sets for example in one.examples]
    lines = [json.dumps(_as_row(name, example)) for name, example in examples]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _as_row(set_name: str, example: Example) -> dict[str, Any]:
    row: dict[str, Any] = {"id": f"{set_name}/{example.example_id}", "output": list(example.references)}
    if example.messages is not None:
        answers = [{"role": "assistant", "content": text} for text in example.references[:1]]
        turns = [turn.for_template() for turn in example.messages]
        return row | {"messages": turns + answers, "tools": list(example.tools)}
    if example.prompt is not None:
        return row | {"prompt": example.prompt}
    return row | {"instruction": example.instruction, "input": example.input}


def in_child(function: Callable[..., Result], *arguments: Any) -> Result:
    """The result of `function(*arguments)` in a process that is forked from one with the libraries.

    Raises the `UserError` that it raises, or one that says that the process was killed. An interrupt ends it.
    """
    context = forking_context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, dict(os.environ), function, arguments))
    process.start()
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        result, error = None, UserError("its process was killed, perhaps for memory")
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()
    if error is not None:
        raise error
    return cast(Result, result)


def _answer(
    sender: Connection, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    obey_parent()
    os.environ.clear()
    os.environ.update(environment)
    answer: tuple[Any, Exception | None]
    with _no_output():
        try:
            answer = function(*arguments), None
        except UserError as error:
            answer = None, error
        except Exception:
            answer = None, RuntimeError(traceback.format_exc())
        sender.send(answer)


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    """Drop what is printed, by libraries below Python too."""
    with Path(os.devnull).open("w") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
        yield
