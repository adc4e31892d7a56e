"""Make a student: from a teacher's layers and neurons, with random weights, or as a copy of another checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dpkd.core.devices import choose_device, explained_out_of_memory
from dpkd.core.errors import UserError, first_line
from dpkd.core.files import replacing_directory, write_atomic
from dpkd.core.identity import canonical_json, tokenizer_sha256
from dpkd.core.models import ModelSource, config_sha256, locate_model, other_eos
from dpkd.core.outputs import output_exists
from dpkd.core.progress import say
from dpkd.core.settings import SAVED_OPTIONS
from dpkd.distill.options.student import InitStudentConfig
from dpkd.distill.student.calibration import Calibration, rows_of_cache, rows_of_data
from dpkd.distill.student.sizes import count_parameters
from dpkd.teacher_cache.store.reader import TeacherCache

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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
    """A student before it is made: what it is made of, and what writes its model to a directory and says what it is."""

    made_of: dict[str, Any]
    write: Callable[[Path], str]


def init_student(config: InitStudentConfig) -> Path:
    """Write the student that `config` describes to the directory `config.out`, and return it.

    With `config.cache` or `config.data` the student is then measured on rows that nothing was chosen on; student.json
    holds the metrics, the number of parameters and the share of the teacher's. A student that exists and was made with
    the same options is kept, and so are its metrics on the same rows. Raises `UserError` when teacher, rows and options
    do not fit together, or `config.out` holds something else.
    """
    teacher = locate_model(config.teacher, "teacher")
    rows = _rows(config, teacher)
    if config.from_config is not None:
        plan = _random(config.from_config, config.seed, teacher)
    elif config.from_checkpoint is not None:
        plan = _copied(config.from_checkpoint, teacher, eos_from_teacher=config.eos_from_teacher)
    else:
        plan = _pruned(config, teacher, rows)
    choose_device(config.device)
    if output_exists(config.out, _MARKER, plan.made_of, "student"):
        say(f"the student {config.out} is complete")
    else:
        _write(config, teacher, plan)
    if rows is not None:
        _measure(config, teacher, rows)
    say(_closing_line(config.out))
    return config.out


def _rows(config: InitStudentConfig, teacher: ModelSource) -> Calibration | None:
    if config.cache is not None:
        cache = TeacherCache.open(config.cache)
        cache.check_tokenizer(teacher, "teacher")
        return rows_of_cache(cache, config.cache_rows)
    if config.data is not None:
        assert config.template is not None  # the config's own check
        return rows_of_data(config.data, config.template, teacher, config.cache_rows, config.template_arg)
    return None


def _pruned(config: InitStudentConfig, teacher: ModelSource, rows: Calibration | None) -> _Plan:
    from dpkd.distill.student.choosing import choose, size_of

    size = size_of(config, teacher.config)
    made_of: dict[str, Any] = {"teacher": teacher.whole_identity(config.dtype)}
    made_of["layers"] = size.layers or f"{config.layers or 'any'}, by importance"
    asked = {"params": config.params, "mlp_width": config.mlp_width, "heads": config.heads}
    made_of |= {name: value for name, value in asked.items() if value is not None}
    if config.needs_rows:
        assert rows is not None  # the config's own check
        made_of |= {"chosen_on": rows.identity}

    def write(directory: Path) -> str:
        from dpkd.distill.student.calibration import with_teacher
        from dpkd.distill.student.measures import batches_of

        model, batches = teacher.load(config.dtype), []
        advice = "Lower --cache-rows, give --dtype bfloat16, or start from a smaller model of the family with --from"
        with explained_out_of_memory("the teacher does not fit", where=config.teacher, advice=advice):
            if config.needs_rows:
                assert rows is not None
                device = choose_device(config.device)
                model = cast(Any, model).to(device)
                say(f"choosing on {len(rows.choose)} rows of {rows.where}")
                batches = with_teacher(model, batches_of(rows.choose, device), len(teacher.tokenizer))
            student, kept = choose(model, size, batches, len(teacher.tokenizer))
        student.cpu().save_pretrained(directory)
        return kept.words(int(model.config.get_text_config().num_hidden_layers))

    return _Plan(made_of, write)


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

    def write(directory: Path) -> str:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student = AutoModelForCausalLM.from_config(student_config, dtype=torch.float32)
        if (teacher.path / "generation_config.json").is_file():
            student.generation_config = GenerationConfig.from_pretrained(teacher.path)
        student.save_pretrained(directory)
        return f"random weights of {path}, seed {seed}"

    made_of = {"config": config_sha256(student_config), "seed": seed, "tokenizer": teacher.tokenizer_identity()}
    return _Plan(made_of, write)


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


def _copied(name: str, teacher: ModelSource, *, eos_from_teacher: bool) -> _Plan:
    from dpkd.distill.rows.vocabulary import check_width

    source = locate_model(name, "checkpoint")
    ours, theirs = source.tokenizer_identity(), teacher.tokenizer_identity()
    eos = teacher.tokenizer.eos_token_id
    only_eos = ours["sha256"] != theirs["sha256"] == tokenizer_sha256(source.tokenizer, eos)
    if only_eos and not eos_from_teacher:
        raise other_eos(source, eos, teacher.name, "checkpoint")
    if ours["sha256"] != theirs["sha256"] and not only_eos:
        raise UserError(
            "the checkpoint's tokenizer is not the teacher's",
            found=f"{ours['sha256'][:12]} ({ours['num_tokens']} tokens) of {source.name}",
            expected=f"{theirs['sha256'][:12]} ({theirs['num_tokens']} tokens) of {teacher.name}",
            advice="Give a checkpoint with the teacher's tokenizer, such as a smaller model of its family",
        )
    check_width(source, teacher.vocab_size)
    made_of = {"checkpoint": source.whole_identity("float32"), "tokenizer": theirs}
    if only_eos:
        made_of["eos_token_id"] = eos

    def write(directory: Path) -> str:
        _copy_files(source, _MODEL_FILES, directory)
        if not only_eos:
            return f"a copy of {name}"
        for file in ("config.json", "generation_config.json"):
            _set_eos(directory / file, teacher)
        return f"a copy of {name} with the teacher's EOS {teacher.tokenizer.eos_token}"

    return _Plan(made_of, write)


def _set_eos(path: Path, teacher: ModelSource) -> None:
    """Give a config the teacher's ids that end a response."""
    if path.is_file():
        ids = teacher.stop_token_ids()
        values = json.loads(path.read_text(encoding="utf-8")) | {"eos_token_id": ids if len(ids) > 1 else ids[0]}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write(config: InitStudentConfig, teacher: ModelSource, plan: _Plan) -> None:
    with replacing_directory(config.out) as temporary:
        words = plan.write(temporary)
        copy_tokenizer(teacher, temporary)
        parameters = count_parameters(ModelSource(str(config.out), temporary).config)
        report = {"kept": words, "parameters": parameters, "share": parameters / count_parameters(teacher.config)}
        (temporary / REPORT).write_bytes(canonical_json(report))
        (temporary / _MARKER).write_bytes(canonical_json(plan.made_of))
        (temporary / SAVED_OPTIONS).write_text(config.to_toml(), encoding="utf-8")


def _measure(config: InitStudentConfig, teacher: ModelSource, rows: Calibration) -> None:
    """Measure the student in `config.out` on the held rows, unless its report has the metrics."""
    path = config.out / REPORT
    report = json.loads(path.read_bytes())
    if report.get("measured_on") == rows.identity:
        return
    from dpkd.distill.student.calibration import with_teacher
    from dpkd.distill.student.measures import batch_measures, batches_of, summary

    device = choose_device(config.device)
    if rows.is_cached:
        batches = list(batches_of(rows.held, device, with_distributions=rows.held[0].chosen.distributions is not None))
    else:
        model = cast(Any, teacher.load(config.dtype)).to(device)
        batches = with_teacher(model, batches_of(rows.held, device), len(teacher.tokenizer))
    source = locate_model(str(config.out), "student")
    student = cast(Any, source.load("float32")).to(device)
    metrics = summary(batch_measures(source, student, batches, len(rows.held)))
    report |= {"measured_on": rows.identity, "rows": rows.where, "before_training": metrics}
    write_atomic(path, canonical_json(report))


def _closing_line(out: Path) -> str:
    report = json.loads((out / REPORT).read_bytes())
    line = f"the student {out}: {report['kept']}; {report['parameters'] / 1e6:.1f}M parameters"
    line += f" ({report['share']:.0%} of the teacher's)"
    if (metrics := report.get("before_training")) is None:
        return line
    kl = ""
    if metrics["kl"] is not None:
        kl = f"KL to the teacher {metrics['kl']:.2f} nats a token, top-1 agreement {metrics['top1_agreement']:.0%}, "
    return (
        f"{line}; before training {kl}perplexity {metrics['perplexity']:.4g} "
        f"({metrics['tokens']} tokens of {metrics['rows']} held rows of {report['rows']})"
    )


def copy_tokenizer(source: ModelSource, directory: Path) -> None:
    """Copy the tokenizer's files byte for byte: saving the tokenizer could change them."""
    _copy_files(source, _TOKENIZER_FILES, directory)


def _copy_files(source: ModelSource, patterns: tuple[str, ...], directory: Path) -> None:
    for pattern in patterns:
        for file in source.path.glob(pattern):
            shutil.copyfile(file, directory / file.name)
