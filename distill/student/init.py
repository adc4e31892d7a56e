"""Make a student: from a teacher's layers and neurons, with random weights, or as a copy of another checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dpkd.core.devices import choose_device
from dpkd.core.errors import UserError, first_line
from dpkd.core.files import replacing_directory, write_atomic
from dpkd.core.identity import canonical_json
from dpkd.core.models import ModelSource, config_sha256, locate_model
from dpkd.core.outputs import output_exists
from dpkd.core.progress import say
from dpkd.distill.options.student import InitStudentConfig
from dpkd.teacher_cache.store.reader import TeacherCache

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: what the student is made of, for a second `dpkd init-student` with the same --out
_MARKER = "dpkd-student.json"
#: number of parameters, and metrics of the student before training
REPORT = "student.json"
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)
_MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class _Plan:
    """A student before it is made: what it is made of, the same in words, and what writes its model to a directory."""

    made_of: dict[str, Any]
    words: str
    write: Callable[[Path], None]


def init_student(config: InitStudentConfig) -> Path:
    """Write the student that `config` describes to the directory `config.out`, and return it.

    With `config.cache` the student is then measured on the cache; student.json holds the metrics and the number of
    parameters. A student that exists and was made with the same options is kept, and so are its metrics on the same
    rows. Raises `UserError` when teacher, cache and options do not fit together, or `config.out` holds something else.
    """
    teacher = locate_model(config.teacher, "teacher")
    cache = None if config.cache is None else TeacherCache.open(config.cache)
    if cache is not None:
        cache.check_tokenizer(teacher, "teacher")
    if config.from_config is not None:
        plan = _random(config.from_config, config.seed, teacher)
    elif config.from_checkpoint is not None:
        plan = _copied(config.from_checkpoint, teacher)
    else:
        plan = _pruned(config, teacher, cache)
    choose_device(config.device)
    if output_exists(config.out, _MARKER, plan.made_of, "student"):
        say(f"the student {config.out} is complete")
    else:
        _write(config, teacher, plan)
    if cache is not None:
        _measure(config, cache)
    return config.out


def _pruned(config: InitStudentConfig, teacher: ModelSource, cache: TeacherCache | None) -> _Plan:
    from dpkd.distill.student.pruning import check_mlp_width, choose_layers, keep_layers, neuron_sizes, prune_mlps

    num_layers = int(teacher.config.get_text_config().num_hidden_layers)
    kept = choose_layers(num_layers, config.layers, config.keep)
    made_of: dict[str, Any] = {"teacher": teacher.identity("float32"), "layers": kept}
    words = f"layers {', '.join(map(str, kept))} of {num_layers}" if len(kept) < num_layers else f"{num_layers} layers"
    width = config.mlp_width
    if width is not None:
        assert cache is not None  # the config's own check
        made_of |= {"mlp_width": width, "cache": cache.fingerprint, "cache_rows": config.cache_rows}
        words += f", {width} neurons in every MLP"
        check_mlp_width(skeleton(teacher.config), width)

    def write(directory: Path) -> None:
        model = teacher.load("float32")
        if width is None:
            student = keep_layers(model, kept)
        else:
            from dpkd.distill.student.measures import batches_of, sample_rows

            assert cache is not None
            device = choose_device(config.device)
            rows = sample_rows(cache, config.cache_rows)
            say(f"measuring the teacher's neurons on {len(rows)} rows of {cache.folder}")
            sizes_LW = neuron_sizes(cast(Any, model).to(device), batches_of(rows, device)).cpu()
            student = prune_mlps(keep_layers(model.cpu(), kept), width, sizes_LW[kept])
        student.save_pretrained(directory)

    return _Plan(made_of, words, write)


def _random(path: Path, seed: int, teacher: ModelSource) -> _Plan:
    student_config = _read_config(path)
    num_tokens, vocab_size = len(teacher.tokenizer), int(student_config.get_text_config().vocab_size)
    if vocab_size < num_tokens:
        raise UserError(
            "the config's vocabulary is smaller than the teacher's tokenizer",
            found=f"vocab_size {vocab_size}",
            expected=f"at least {num_tokens}",
            where=path,
            advice=f"Set its vocab_size to the teacher's {teacher.vocab_size}",
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # the student takes the teacher's tokenizer
        setattr(student_config, name, getattr(teacher.config, name, None))

    def write(directory: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student = AutoModelForCausalLM.from_config(student_config, dtype=torch.float32)
        if (teacher.path / "generation_config.json").is_file():
            student.generation_config = GenerationConfig.from_pretrained(teacher.path)
        student.save_pretrained(directory)

    made_of = {"config": config_sha256(student_config), "seed": seed, "tokenizer": teacher.tokenizer_identity()}
    return _Plan(made_of, f"random weights of {path}, seed {seed}", write)


def _read_config(path: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    if not path.is_file():
        raise UserError("the student's config is missing", where=path, advice="Give the path of a config.json")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"the student's config cannot be used: {first_line(error)}",
            where=path,
            advice="Give a config.json with the model_type of a model in transformers",
        ) from None


def _copied(name: str, teacher: ModelSource) -> _Plan:
    from dpkd.distill.rows.vocabulary import check_width

    source = locate_model(name, "checkpoint")
    ours, theirs = source.tokenizer_identity(), teacher.tokenizer_identity()
    if ours["sha256"] != theirs["sha256"]:
        raise UserError(
            "the checkpoint's tokenizer is not the teacher's",
            found=f"{ours['sha256'][:12]} ({ours['num_tokens']} tokens) of {source.name}",
            expected=f"{theirs['sha256'][:12]} ({theirs['num_tokens']} tokens) of {teacher.name}",
            advice="Give a checkpoint with the teacher's tokenizer, such as a smaller model of its family",
        )
    check_width(source, teacher.vocab_size)
    made_of = {"checkpoint": source.identity("float32"), "tokenizer": theirs}
    return _Plan(made_of, f"a copy of {name}", partial(_copy_files, source, _MODEL_FILES))


def _write(config: InitStudentConfig, teacher: ModelSource, plan: _Plan) -> None:
    with replacing_directory(config.out) as temporary:
        plan.write(temporary)
        copy_tokenizer(teacher, temporary)
        model = skeleton(ModelSource(str(config.out), temporary).config)
        parameters = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
        (temporary / REPORT).write_bytes(canonical_json({"parameters": parameters}))
        (temporary / _MARKER).write_bytes(canonical_json(plan.made_of))
        (temporary / "dpkd.toml").write_text(config.to_toml(), encoding="utf-8")
    say(f"the student {config.out}: {plan.words}; {parameters / 1e6:.1f}M parameters")


def _measure(config: InitStudentConfig, cache: TeacherCache) -> None:
    """Measure the student in `config.out` on `cache`, unless its report has the metrics, and print them."""
    report_path = config.out / REPORT
    student = locate_model(str(config.out), "student")
    report = json.loads(report_path.read_bytes())
    measured_on = {"cache": cache.fingerprint, "cache_rows": config.cache_rows}
    if report.get("measured_on") != measured_on:
        from dpkd.distill.student.measures import measure_student

        model, device = student.load("float32"), choose_device(config.device)
        metrics = measure_student(student, model, cache, config.cache_rows, device)
        report |= {"measured_on": measured_on, "before_training": metrics}
        write_atomic(report_path, canonical_json(report))
    metrics = report["before_training"]
    kl = "" if metrics["kl"] is None else f", KL to the teacher {metrics['kl']:.3f} nats a token"
    say(
        f"the student {config.out} before training: perplexity {metrics['perplexity']:.5g}{kl} "
        f"({metrics['tokens']} response tokens of {metrics['rows']} rows of {cache.folder})"
    )


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """A model of `config` without memory for its weights: for names, shapes and counts."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def copy_tokenizer(source: ModelSource, directory: Path) -> None:
    """Copy the tokenizer's files byte for byte: saving the tokenizer could change them."""
    _copy_files(source, _TOKENIZER_FILES, directory)


def _copy_files(source: ModelSource, patterns: tuple[str, ...], directory: Path) -> None:
    for pattern in patterns:
        for file in source.path.glob(pattern):
            shutil.copyfile(file, directory / file.name)
