"""The pilot of `dpkd cache fidelity`: a student trained at several K, to see what the number of entries costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpkd.core.errors import UserError
from dpkd.core.models import locate_model
from dpkd.core.progress import say

if TYPE_CHECKING:
    from dpkd.distill.options.train import TrainConfig
    from dpkd.teacher_cache.options.audit import FidelityConfig
    from dpkd.teacher_cache.store.reader import TeacherCache

_MOST_HELD_OUT = 64  # examples of a pilot: no more than `dpkd train` holds out by default


def pilot_of_k(config: FidelityConfig, cache: TeacherCache) -> dict[str, Any]:
    """What the number of entries costs a student: copies trained at several K, measured with all entries.

    Runs that differ in K alone have the same seed, so the same order of rows and the same held-out examples. Keys:
    `student`, `steps`, `seeds`, `held_out` (examples), `kl_before` (nats, mean over seeds), and `runs` by rising K:
    `top_k`; `kl`, KL(teacher || student) of each seed in nats per token; `kl_mean`, `kl_spread` (standard deviation);
    `over_mean`, `over_spread`, the same of its difference to the largest K. Raises `UserError` for a K that the cache
    does not have, and for a student that cannot learn from it.
    """
    import tempfile

    import numpy as np

    from dpkd.distill import TrainConfig, train
    from dpkd.distill.rows.held_out import cache_examples

    assert config.student is not None  # checked by the config
    most = cache.top_k
    ks = sorted(set(config.pilot_k or [k for k in (most // 16, most // 4, most) if k]))
    if not ks or ks[-1] > most:
        raise UserError(
            "the cache does not have so many entries per position",
            found=f"--pilot-k {ks[-1] if ks else 1}",
            expected=f"at most {most}",
            where=cache.folder,
            advice="Lower --pilot-k, or build a cache with a larger --top-k",
        )
    num = max(min(len(cache_examples(cache)) // 4, _MOST_HELD_OUT), 1)
    kl: dict[int, list[float]] = {k: [] for k in ks}
    before = []
    for seed in range(config.pilot_seeds):
        for k in ks:
            say(f"pilot: {config.student} at K = {k}, seed {seed}")
            with tempfile.TemporaryDirectory(prefix="dpkd-pilot-") as directory:
                chosen = {
                    "cache": str(cache.folder), "student": config.student, "out": Path(directory) / "run", "top_k": k,
                    "steps": config.pilot_steps, "learning_rate": config.pilot_learning_rate, "seed": seed,
                    "validation_examples": num, "validate_every": config.pilot_steps, "best_metric": "last",
                    "save_every": None, "tracker": "none", "device": config.device,
                }  # fmt: skip
                options = TrainConfig.parse(chosen, where="the pilot")
                if k == ks[0]:
                    before.append(_held_out_kl(config.student, cache, options))
                kl[k].append(_held_out_kl(str(train(options)), cache, options))
    largest = np.array(kl[ks[-1]])
    runs = []
    for k, values in kl.items():
        over = np.array(values) - largest
        means = {"kl_mean": np.mean(values), "kl_spread": np.std(values, ddof=1)}
        means |= {"over_mean": over.mean(), "over_spread": over.std(ddof=1)}
        runs.append({"top_k": k, "kl": values} | {name: float(value) for name, value in means.items()})
    facts = {"student": config.student, "steps": config.pilot_steps, "seeds": config.pilot_seeds, "held_out": num}
    return facts | {"kl_before": float(np.mean(before)), "runs": runs}


def _held_out_kl(model_dir: str, cache: TeacherCache, options: TrainConfig) -> float:
    """KL(teacher || student) in nats per token on what `options` holds out, with all entries of the cache."""
    from dpkd.core.devices import choose_device
    from dpkd.distill.rows.sources import open_cache_rows
    from dpkd.distill.student.measures import batch_measures, batches_of

    held_out = open_cache_rows(cache, None, options).validation
    assert held_out is not None  # `options` asks for some
    rows = [held_out.row(group, i) for group, size in enumerate(held_out.group_sizes) for i in range(size)]
    student, device = locate_model(model_dir, "student"), choose_device(options.device)
    model: Any = student.load("float32")
    values = batch_measures(student, model.to(device), batches_of(rows, device, with_distributions=True), len(rows))
    return float(values["kld"].sum() / values["tokens"].sum())
