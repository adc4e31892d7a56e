"""Copies of a model with Gaussian noise on its weights, each compared with a cache's teacher (Fig. 2 of the paper)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpkd.core.errors import UserError
from dpkd.core.files import replacing_directory, write_atomic, write_text
from dpkd.core.identity import canonical_json, software_versions
from dpkd.core.models import ModelSource, locate_model
from dpkd.core.outputs import output_exists
from dpkd.core.progress import say
from dpkd.pipelines.commands.options import NoiseConfig
from dpkd.teacher_cache.store.reader import TeacherCache

if TYPE_CHECKING:
    import torch

#: file of a copy that records what it is made of
_MARKER = "dpkd-noise.json"
#: file of a copy with its metrics
_MEASURES = "measures.json"
#: the report on all copies; written last
REPORT = "noise.json"


def add_noise(config: NoiseConfig) -> Path:
    """Write a copy for each scale and seed of `config` and measure it; the path of the report, noise.json.

    Existing copies of the same model and metrics on the same rows are kept. Raises `UserError` when model and cache do
    not fit together, and for a directory that holds something else.
    """
    from dpkd.distill.student.measures import check_same_prompts, measure_model

    source = locate_model(config.model, "model")
    cache = TeacherCache.open(config.cache)
    check_same_prompts(source, cache)
    if cache.top_k == 0:
        raise UserError(
            "the cache keeps no distributions to measure divergences from",
            where=config.cache,
            advice="Build a cache with --top-k 64",
        )
    base = source.whole_identity("float32")
    measured_on = {"cache": cache.fingerprint, "cache_rows": config.cache_rows, "beta": config.beta}
    copies = []
    for (scale, seed), directory in config.copies().items():
        made_of = {"model": base, "scale": scale, "seed": seed}
        if not output_exists(directory, _MARKER, made_of, "copy"):
            _write_copy(source, directory, made_of)
        held = _read(directory / _MEASURES)
        if held.get("measured_on") != measured_on:
            measures = measure_model(
                str(directory), config.cache, num_rows=config.cache_rows, beta=config.beta, device=config.device
            )
            held = {"measured_on": measured_on, "measures": measures}
            write_atomic(directory / _MEASURES, canonical_json(held))
        copies.append({"name": directory.name, "scale": scale, "seed": seed, **held["measures"]})
        say(
            f"{directory}: rKLD of the first token {copies[-1]['rkld_first']:.4f}, reward {copies[-1]['reward']:.4f} "
            f"on {copies[-1]['rows']} rows"
        )
    report = {
        "model": base,
        "model_directory": config.model,
        "cache_directory": config.cache,
        **measured_on,
        "copies": copies,
        "software": software_versions(),
    }
    write_text(config.out / REPORT, json.dumps(report, indent=2, allow_nan=False) + "\n")
    return config.out / REPORT


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}


def _write_copy(source: ModelSource, directory: Path, made_of: dict[str, Any]) -> None:
    from dpkd.distill.student.init import copy_tokenizer

    with replacing_directory(directory) as temporary:
        model = source.load("float32")
        add_gaussian_noise(model, made_of["scale"], made_of["seed"])
        model.save_pretrained(temporary)
        copy_tokenizer(source, temporary)
        if (source.path / "dpkd.json").is_file():  # the template that it was trained with
            shutil.copyfile(source.path / "dpkd.json", temporary / "dpkd.json")
        (temporary / _MARKER).write_bytes(canonical_json(made_of))


def add_gaussian_noise(model: torch.nn.Module, scale: float, seed: int) -> None:
    """Add Gaussian noise to every weight matrix of `model` in place, to embeddings too (to tied ones once).

    Its standard deviation is `scale` times the root mean square of the matrix, so one scale suits matrices of any size.
    The draw depends on `seed` alone: copies of one seed differ only in how far they are moved. Biases and norms stay as
    they are.
    # differs from the paper: it does not say how its noise is scaled or drawn
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * parameter.square().mean().sqrt() * noise)
