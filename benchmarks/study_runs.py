"""One run of the study of objectives (`objectives_study.py`): an arm is trained as its recipe says, then measured.

Everything here runs in a worker process that lives as long as the study and loads the teacher once.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from study_arms import SIZE_RECIPE, Study
from study_measures import cache_size, measure
from study_page import START

from dpkd.core.devices import choose_device
from dpkd.core.json_lines import read_json_lines
from dpkd.distill.training import train
from dpkd.pipelines.commands.registry import COMMANDS
from dpkd.pipelines.recipe.steps import Step
from dpkd.teacher_cache.build.cache import build_cache
from dpkd.teacher_cache.options.cache import CacheConfig


def prepare(study: Study) -> dict[str, float]:
    """What every arm needs: caches and the student; seconds by step."""
    steps = [step for step in study.start_steps() if not _needs_student(step)]
    held_out = CacheConfig(
        teacher=study.teacher, data=study.select, out=str(study.out / "selection"), template="chat",
        limit=study.select_rows, max_new_tokens=study.tokens, top_k=0, **_engine(study),
    )  # fmt: skip
    return _run_steps(study, [*steps, Step("cache-teacher", held_out)])


def prepare_rounds(study: Study) -> dict[str, Any]:
    """The student that writes, the rounds that arms share, and what teacher, start and writer score."""
    seconds = _run_steps(study, [step for step in study.start_steps() if _needs_student(step)])
    models = {"teacher": study.teacher, "start": str(study.out / "student"), "writer": str(study.out / "writer")}
    return {"seconds": seconds} | {name: measure(study, model, scored=True) for name, model in models.items()}


def _needs_student(step: Step) -> bool:
    return getattr(step.config, "student", None) is not None


def _run_steps(study: Study, steps: Sequence[Step]) -> dict[str, float]:
    seconds = {}
    for step in steps:
        started_s = time.perf_counter()
        COMMANDS[step.command].run(_on_machine(study, step))
        seconds[step.output_name.replace(str(study.out), "OUT")] = round(time.perf_counter() - started_s, 1)
    return seconds


def _engine(study: Study) -> dict[str, Any]:
    return {"device": study.device, "engine": study.engine, "max_num_seqs": study.max_num_seqs}


def _on_machine(study: Study, step: Step) -> Any:
    """The options of a step with those of the machine, and the shared round for an arm's first."""
    changes: dict[str, Any] = {} if step.command == "prepare-data" else {"device": study.device}
    if step.command == "cache-teacher":
        changes = _engine(study)
    if step.round == 0 and step.command == "train":
        changes["round"] = Path(str(step.config.student)).name
    return step.config.model_copy(update=changes)


def train_arm(study: Study, arm: str, rate: float, seed: int) -> tuple[Path, dict[str, float]]:
    """Run the steps of an arm; the trained student, and the seconds of its training and of its rounds."""
    steps = study.arms(rate, seed, (*study.recipes, SIZE_RECIPE))[arm]
    seconds = {"train_s": 0.0, "round_s": 0.0}
    final = Path(steps[-1].out)
    record = study.run_dir(arm, rate, seed) / "seconds.json"
    if record.is_file() and (final / "model.safetensors").is_file():
        return final, json.loads(record.read_text())
    for step in steps:
        config, started_s = _on_machine(study, step), time.perf_counter()
        if step.command == "cache-teacher":
            if step.round != 0:  # the first round is the one that all arms share
                build_cache(config)
            seconds["round_s"] += time.perf_counter() - started_s
            continue
        lines = read_json_lines(train(config) / "metrics.jsonl")
        seconds["train_s"] += sum(line["step_time_s"] for _, line in lines)
    record.write_text(json.dumps(seconds))
    for step in steps:  # earlier rounds need their students until the last one is trained
        if step.command == "train" and Path(step.out) != final:
            _drop_weights(Path(step.out))
    return final, seconds


def measure_run(study: Study, arm: str, rate: float, seed: int, *, scored: bool) -> dict[str, Any]:
    """Train an arm and measure its distance from the teacher; with `scored` also its own answers."""
    started_s = time.perf_counter()
    if arm == START:
        return prepare_rounds(study)
    out, seconds = train_arm(study, arm, rate, seed)
    result: dict[str, Any] = {"arm": arm, "rate": rate, "seed": seed, "device": choose_device(study.device).type}
    result |= {**seconds, **measure(study, str(out), scored=scored)}
    if scored:
        drop_run(study, arm, rate, seed)
    return result | {"seconds": time.perf_counter() - started_s}


def drop_run(study: Study, arm: str, rate: float, seed: int) -> None:
    """Delete the weights of a run that is measured."""
    for directory in (study.run_dir(arm, rate, seed), *study.run_dir(arm, rate, seed).glob("*")):
        _drop_weights(directory)


def _drop_weights(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        path.unlink()
    for path in directory.glob("checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def cache_sizes(study: Study) -> dict[str, dict[str, float]]:
    """`cache_size` of every cut of study/cache-size, and of the default cache."""
    cuts: dict[str, tuple[int | None, float | None]] = {"dpkd-all": (64, None)}
    for name, (step,) in study.arms(1.0, 0, [SIZE_RECIPE]).items():
        cuts[name] = step.config.top_k, step.config.top_mass
    return {name: cache_size(study, *cut) for name, cut in cuts.items()}
