"""Find a causal language model by directory or hub name, and say what it is without loading it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dpkd.core.errors import UserError, first_line
from dpkd.core.identity import fingerprint, tokenizer_probe, tokenizer_sha256, weights_sha256
from dpkd.core.json_lines import loads

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

#: keys of a generation config that say who wrote it
_OF_TRANSFORMERS = ("transformers_version", "_from_model_config")


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint directory in Hugging Face's layout: `name` as asked for, `revision` for one from a hub."""

    name: str
    path: Path
    revision: str | None = None

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:
            raise UserError(f"the model's config cannot be read: {error}", where=self.path) from None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:
            raise UserError(f"the tokenizer cannot be read: {error}", where=self.path) from None

    @property
    def vocab_size(self) -> int:
        """Width of the logits (a padded vocabulary counts its padding)."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def max_positions(self) -> int | None:
        """Longest sequence that the positions reach, in tokens; None where the config sets no limit."""
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None

    def stop_token_ids(self) -> list[int]:
        """Ids that end a response: the generation config's EOS ids and the tokenizer's, sorted.

        Without a generation config the model's own config is used, as in transformers.
        """
        ids: set[int] = set()
        path = self.path / "generation_config.json"
        if path.exists():
            value = _eos_of_generation(path)
        else:
            value = getattr(self.config.get_text_config(), "eos_token_id", None)
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
        if self.tokenizer.eos_token_id is not None:
            ids.add(int(self.tokenizer.eos_token_id))
        if not ids:
            raise UserError("the model has no EOS token", where=self.path)
        return sorted(ids)

    def decode(self, ids: list[int]) -> str:
        """Text of a response, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def load(self, dtype: str) -> PreTrainedModel:
        """The model itself, from safetensors alone, on the CPU."""
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        before = logging.get_verbosity()
        logging.set_verbosity_error()  # what does not fit is an error below, with its own words
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.path,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"the model cannot be loaded: {first_line(error)}", where=self.path) from None
        finally:
            logging.set_verbosity(before)
        model, info = loaded  # the annotation knows no loading info
        _check_fits_config(model, info, self.path)
        return cast("PreTrainedModel", model)

    def identity(self, dtype: str) -> dict[str, Any]:
        """Name, revision, dtype, vocabulary width, and hashes of config and weights.

        The files of the tokenizer and of generation are not in it: a cache has identities of their own for what it
        takes from them.
        """
        return {
            "name": self.path.resolve().name if self.revision is None else self.name,
            "revision": self.revision,
            "dtype": dtype,
            "vocab_size": self.vocab_size,
            "config_sha256": config_sha256(self.config),
            # None where a server holds the weights and this machine does not
            "weights_sha256": weights_sha256(self.path) if any(self.path.glob("*.safetensors")) else None,
        }

    def whole_identity(self, dtype: str) -> dict[str, Any]:
        """`identity`, and hashes of what is copied with the weights: tokenizer, chat template, generation config."""
        path = self.path / "generation_config.json"
        return self.identity(dtype) | {
            "tokenizer_sha256": tokenizer_sha256(self.tokenizer),
            "chat_template_sha256": fingerprint(self.tokenizer.chat_template),
            "generation_config_sha256": fingerprint(_read_generation_config(path) if path.is_file() else None),
        }

    @cached_property
    def num_parameters(self) -> int | None:
        """Weights in the checkpoint's safetensors, tied ones counted once; None where this machine has no weights."""
        from math import prod

        from safetensors import safe_open

        files = sorted(self.path.glob("*.safetensors"))
        total = 0
        for file in files:
            with safe_open(file, framework="numpy") as tensors:
                total += sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        return total if files else None

    def trained_template(self) -> dict[str, str] | None:
        """Name and sha256 of the prompt template in the model's `dpkd.json`; None for a model without that file,
        and for one from a cache whose template is unknown.

        Raises `UserError` when the file names no template.
        """
        path = self.path / "dpkd.json"
        if not path.is_file():
            return None
        try:
            template = loads(path.read_text(encoding="utf-8"))["template"]
            if template["name"] == "unknown":  # the cache was imported from texts without one
                return None
            return {key: str(template[key]) for key in ("name", "sha256")}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the checkpoint's dpkd.json has no template: {type(error).__name__} {error}",
                where=path,
                advice="Delete the file to use the model with a template of your choice",
            ) from None

    def tokenizer_probe(self) -> str:
        """Hash of the ids that this model's tokenizer gives a fixed text."""
        return tokenizer_probe(self.tokenizer)

    def tokenizer_identity(self) -> dict[str, Any]:
        """Content hash and size of this model's tokenizer."""
        return {"sha256": tokenizer_sha256(self.tokenizer), "num_tokens": len(self.tokenizer)}


@dataclass(frozen=True)
class RemoteModel(ModelSource):
    """A model behind an endpoint, which calls it `served`. `path` holds its tokenizer, and perhaps its config.

    Nobody can check which weights the endpoint runs: they, their revision and their dtype are unknown.
    """

    served: str = ""

    @property
    def _has_config(self) -> bool:
        return (self.path / "config.json").is_file()

    @property
    def vocab_size(self) -> int:
        """Width of the logits, or without a config the tokenizer's largest id plus 1."""
        return super().vocab_size if self._has_config else max(self.tokenizer.get_vocab().values()) + 1

    @property
    def max_positions(self) -> int | None:
        """As the config says; None without one."""
        return super().max_positions if self._has_config else None

    def stop_token_ids(self) -> list[int]:
        """As for other models; without configs the tokenizer's EOS."""
        if self._has_config or (self.path / "generation_config.json").is_file():
            return super().stop_token_ids()
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token", where=self.path)
        return [int(self.tokenizer.eos_token_id)]

    def identity(self, dtype: str) -> dict[str, Any]:
        """The name and the width of the vocabulary; everything else is unknown, `dtype` too."""
        unknown = dict.fromkeys(("revision", "dtype"), "unknown") | dict.fromkeys(("config_sha256", "weights_sha256"))
        return {"name": self.served, "vocab_size": self.vocab_size} | unknown


def other_eos(model: ModelSource, eos_token_id: int, teacher: str, role: str, *, where: object = None) -> UserError:
    """The error for a model whose tokenizer is the teacher's except for its EOS."""
    theirs = model.tokenizer.convert_ids_to_tokens(eos_token_id)
    return UserError(
        f"the {role}'s tokenizer is the teacher's except for its EOS",
        found=f"{model.tokenizer.eos_token!r} of {model.name}",
        expected=f"{theirs!r} of {teacher}",
        where=where,
        advice=f"Make a student with the teacher's EOS: `dpkd init-student --from {model.name} --eos-from-teacher`",
    )


def _read_generation_config(path: Path) -> dict[str, Any]:
    """What a generation_config.json says of generation; not which version of transformers wrote it."""
    try:
        values = loads(path.read_text(encoding="utf-8"))
        return {key: value for key, value in values.items() if key not in _OF_TRANSFORMERS}
    except (ValueError, AttributeError) as error:
        raise UserError(f"the generation config is not JSON: {first_line(error)}", where=path) from None


def _eos_of_generation(path: Path) -> Any:
    """The EOS ids of a generation_config.json: a number, a list of numbers, or None."""
    value = _read_generation_config(path).get("eos_token_id")
    if not all(isinstance(item, int) for item in (value if isinstance(value, list) else [value or 0])):
        raise UserError("the EOS of the generation config is no token id", found=repr(value), where=path)
    return value


def _check_fits_config(model: PreTrainedModel, info: dict[str, Any], where: Path) -> None:
    """Raise `UserError` if weights were left random, or layers left out, because the config is another model's."""
    mismatched = sorted(str(item[0]) for item in info["mismatched_keys"])
    numbers = re.compile(r"\d+")
    kinds = {numbers.sub("N", name) for name in model.state_dict()}
    surplus = sorted(name for name in info["unexpected_keys"] if numbers.sub("N", name) in kinds)
    for what, names in (
        ("have other shapes than the config says", mismatched),
        ("lack some that the config asks for", sorted(info["missing_keys"])),
        ("have layers that the config does not", surplus),
    ):
        if names:
            raise UserError(
                f"the model's weights {what}",
                found=f"{len(names)}, the first: {names[0]}",
                where=where,
                advice="Give the config.json and the weights of one model",
            )


def _check_readable(path: Path, role: str) -> None:
    """Raise `UserError` if a file of weights is cut short, or one that the index names is missing."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"the {role}'s weights cannot be read: {first_line(error)}",
                found=f"{file.stat().st_size} bytes",
                where=file,
                advice="The file is cut short or corrupt: copy or download it again",
            ) from None
    for index in path.glob("*.safetensors.index.json"):
        try:
            named = {str(name) for name in loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"the {role}'s index of weights cannot be read: {first_line(error)}", where=index) from None
        if missing := sorted(name for name in named if not (path / name).is_file()):
            raise UserError(
                f"{len(missing)} files of the {role}'s weights are missing", found=f"no {missing[0]}", where=path
            )


def config_sha256(config: PretrainedConfig) -> str:
    """Hash of what a config says of the model itself: not of its name, its dtype or a version of transformers."""
    other = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
    return fingerprint({key: value for key, value in config.to_dict().items() if key not in other})


def locate_remote_model(name: str, served: str) -> RemoteModel:
    """The model that an endpoint calls `served`, whose tokenizer is at `name`, a directory or a hub name."""
    source = locate_model(name, "teacher's tokenizer", needs_weights=False, needs_config=False)
    return RemoteModel(source.name, source.path, source.revision, served)


def locate_model(name: str, role: str, *, needs_weights: bool = True, needs_config: bool = True) -> ModelSource:
    """The model `name`: a local directory, or a name on the Hugging Face hub (fetched once, safetensors only).

    Without `needs_weights` config and tokenizer are enough, as for a model that a server runs. Raises `UserError`
    (naming `role`: teacher, student, model) when it is not there or holds no safetensors.
    """
    path = Path(name)
    revision = None
    if not path.is_dir():
        if path.is_absolute() or name.startswith(".") or name.count("/") != 1 or path.exists():
            raise UserError(
                f"the {role} is not found",
                found=f"no directory {name!r}",
                expected="a checkpoint directory or a hub name OWNER/MODEL",
            )
        path, revision = _fetch(name, role, needs_weights)
    if needs_weights and (path / "adapter_config.json").is_file():
        raise UserError(
            f"the {role}'s directory holds an adapter, and a model is needed: merge it first",
            found="adapter_config.json",
            where=path,
            advice='Run python -c "from peft import AutoPeftModelForCausalLM as Model; '
            f"Model.from_pretrained('{path}').merge_and_unload().save_pretrained('MERGED')\", copy the tokenizer's "
            "files to MERGED, and give MERGED",
        )
    if needs_config and not (path / "config.json").is_file():
        raise UserError(
            f"the {role}'s directory holds no config.json", where=path, advice="Give a Hugging Face checkpoint"
        )
    if needs_weights and not any(path.glob("*.safetensors")):
        raise UserError(
            f"the {role}'s directory holds no *.safetensors",
            where=path,
            advice="Pickled weights are not read; save the model with `save_pretrained`",
        )
    if needs_weights:
        _check_readable(path, role)
    return ModelSource(name, path, revision)


def _fetch(name: str, role: str, with_weights: bool) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.txt", "*.model", *(["*.safetensors"] if with_weights else [])]
    try:
        path = Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        reason = first_line(error)
        raise UserError(
            f"the {role} is not found: neither a directory nor a model that can be fetched",
            found=repr(name),
            advice=f"Check the name; the hub said: {reason}",
        ) from None
    return path, path.name
