"""Commands that print more than a path: each calls one public function of a package and returns the exit code.

The functions are imported inside: a command loads only what it needs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpkd.core.progress import say
from dpkd.pipelines.process import EXIT_PARTLY

if TYPE_CHECKING:
    from dpkd.distill.options.train import TrainConfig
    from dpkd.evaluate.options.eval import EvalConfig
    from dpkd.evaluate.options.judge import JudgeConfig
    from dpkd.evaluate.options.merge import MergeConfig
    from dpkd.teacher_cache.options.audit import FidelityConfig, InfoOptions, RepairOptions, VerifyOptions
    from dpkd.teacher_cache.options.cache import CacheConfig
    from dpkd.teacher_cache.options.derive import CacheFilterConfig, CacheMergeConfig, ImportConfig


def cache_teacher(config: CacheConfig) -> int:
    if config.dry_run:
        from dpkd.teacher_cache.build.estimate import estimate_cost

        say(f"the options of dpkd cache-teacher:\n{config.to_toml()}")
        print(estimate_cost(config).text())
        return 0
    from dpkd.teacher_cache.build.cache import build_cache

    manifest = build_cache(config)
    print(config.out)
    return EXIT_PARTLY if manifest.failed else 0


def train_student(config: TrainConfig) -> int:
    from dpkd.distill.training import train

    run = train(config)
    if os.environ.get("RANK", "0") == "0":  # of several processes one prints the result
        print(run)
    return EXIT_PARTLY if json.loads((run / "run.json").read_text()).get("stopped_by_alarm") else 0


def evaluate_models(config: EvalConfig) -> None:
    from dpkd.evaluate.evaluation import evaluate

    _print_report(evaluate(config))


def merge_reports(config: MergeConfig) -> None:
    from dpkd.evaluate.merge.merge import merge

    _print_report(merge(config))


def _print_report(path: Path) -> None:
    from dpkd.evaluate.views.terminal import print_report

    print_report(json.loads(path.read_text(encoding="utf-8")))
    print(f"report: {path}")


def judge_answers(config: JudgeConfig) -> int:
    from dpkd.evaluate.judge.judge import estimate, judge
    from dpkd.evaluate.judge.markdown import judge_markdown
    from dpkd.evaluate.judge.tokens import estimate_text

    if config.estimate:
        print(estimate_text(estimate(config)))
        return 0
    path = judge(config)
    report = json.loads(path.read_text(encoding="utf-8"))
    print(judge_markdown(report))
    print(f"report: {path}")
    return EXIT_PARTLY if report["refused"] else 0


def compare_with_teacher(config: FidelityConfig) -> None:
    from dpkd.teacher_cache.audit.fidelity import measure_fidelity
    from dpkd.teacher_cache.audit.fidelity_table import fidelity_table

    if config.pilot:
        from dpkd.pipelines.commands.pilot_of_k import pilot_of_k

        report = measure_fidelity(config, pilot_of_k)
    else:
        report = measure_fidelity(config)
    print(json.dumps(report, indent=2, ensure_ascii=False) if config.as_json else fidelity_table(report))


def import_stored(config: ImportConfig) -> int:
    from dpkd.teacher_cache.build.importing.importing import import_cache

    manifest = import_cache(config)
    print(config.out)
    return EXIT_PARTLY if manifest.failed else 0


def verify(config: VerifyOptions) -> None:
    from dpkd.teacher_cache.audit.verify import verify_cache

    counts = verify_cache(config.location)
    print(f"{config.location}: sound: {counts['rows']} rows in {counts['shards']} shards, {counts['rounds']} rounds")


def merge_caches(config: CacheMergeConfig) -> None:
    from dpkd.teacher_cache.build.derived.merging import merge_caches

    merge_caches(config)
    print(config.out)


def filter_cache(config: CacheFilterConfig) -> None:
    from dpkd.teacher_cache.build.derived.filtering import filter_cache

    filter_cache(config)
    print(config.out)


def repair(config: RepairOptions) -> None:
    from dpkd.teacher_cache.build.repair import repair_cache

    done = repair_cache(config.location)
    if not done.bad:
        print(f"{config.location}: all {done.shards} shards are sound: nothing to repair")
        return
    print(f"{config.location}: {done.bad} of {done.shards} shards repaired")
    if done.different:
        print(
            f"{done.different} of them have other bytes than the lost ones, because the engine's numbers depend on the "
            "batch or the software: the manifest has their new checksums"
        )


def describe(config: InfoOptions) -> None:
    from dpkd.teacher_cache.audit.info import describe_cache

    facts = describe_cache(config.location, config.samples)
    if config.as_json:
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
            for number, item in enumerate(value, start=1):
                print(f"{indent}{key} {number} of {len(value)}:")
                _print_facts(item, indent + "  ")
        elif value not in (None, [], (), {}):
            print(f"{indent}{key}: {f'{value:.4g}' if isinstance(value, float) else _one_line(value)}")


def _one_line(value: object) -> str:
    """`value` as text; control characters in the text of a model are escaped."""
    return repr(value)[1:-1] if isinstance(value, str) and not value.isprintable() else str(value)


def _print_histogram(bins: dict[str, int], indent: str) -> None:
    print(f"{indent}response_lengths (tokens: rows):")
    most = max(bins.values(), default=1)
    for name, count in bins.items():
        print(f"{indent}  {name:>12} {count:>8} {'#' * round(40 * count / most)}")
