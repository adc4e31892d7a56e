"""Toy models with a real byte-level BPE tokenizer, trained on the excerpt of Dolly that the project ships."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# toy models are too small for several threads, and threads that wait for each other stall on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
DOLLY = ROOT / "examples" / "dolly"
VOCAB_SIZE = 600

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(directory: Path, texts: list[str], vocab_size: int) -> None:
    """A byte-level BPE tokenizer with EOS `<|end|>` and a chat template, saved to `directory`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    wrapped.chat_template = _CHAT_TEMPLATE
    wrapped.save_pretrained(directory)


def make_toy(directory: Path, tokenizer_dir: Path, *, layers: int, seed: int, vocab_size: int = VOCAB_SIZE) -> Path:
    """A Llama of hidden size 64 with random weights, peaked enough that its distributions are not flat."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,  # vLLM's CPU attention takes heads of 32 and more
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    for file in tokenizer_dir.glob("*"):
        shutil.copyfile(file, directory / file.name)
    return directory


def dolly_texts(name: str) -> list[str]:
    """Instructions and answers of a shipped file."""
    rows = [json.loads(line) for line in (DOLLY / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["instruction"] + "\n" + row["output"] for row in rows]


def write_toy_data(path: Path) -> Path:
    """Twenty short rows of the shipped excerpt."""
    lines = (DOLLY / "train.jsonl").read_text(encoding="utf-8").splitlines()
    short = [line for line in lines if len(line) < 420][:20]
    path.write_text("\n".join(short) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def toy_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(directory, dolly_texts("train"), VOCAB_SIZE)
    return directory


@pytest.fixture(scope="session")
def toy_teacher(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Path) -> Path:
    return make_toy(tmp_path_factory.mktemp("models") / "toy-teacher", toy_tokenizer, layers=2, seed=1)


@pytest.fixture(scope="session")
def toy_student(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Path) -> Path:
    return make_toy(tmp_path_factory.mktemp("models") / "toy-student", toy_tokenizer, layers=1, seed=2)


@pytest.fixture(scope="session")
def other_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with another tokenizer of the same size."""
    tokenizer_dir = tmp_path_factory.mktemp("other-tokenizer")
    train_tokenizer(tokenizer_dir, dolly_texts("heldout"), VOCAB_SIZE)
    return make_toy(tmp_path_factory.mktemp("models") / "other-student", tokenizer_dir, layers=1, seed=3)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSONL and return the path."""

    def write(rows: list[object], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def teacher_dir() -> Path:
    """The small real teacher, which scripts/test.sh fetches."""
    directory = ROOT / "models" / "smollm2-135m-instruct"
    if not (directory / "config.json").is_file():
        pytest.fail(f"{directory} is not there: run the tests with `bash scripts/test.sh`")
    return directory


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture(scope="session")
def repeat_rows(toy_data: Path) -> Callable[[Path, int], Path]:
    """Write the toy rows several times, under other ids: enough that a kill falls into the middle."""

    def write(path: Path, copies: int) -> Path:
        rows = [json.loads(line) for line in toy_data.read_text(encoding="utf-8").splitlines()]
        lines = [json.dumps(row | {"id": f"{copy}-{row['id']}"}) for copy in range(copies) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def toy_cache(tmp_path_factory: pytest.TempPathFactory, toy_teacher: Path, toy_student: Path, toy_data: Path) -> Path:
    """A finished cache of teacher and reference rows (6 rows a shard) with the round `r0`; never written to."""
    from dpkd.teacher_cache.build import build_cache
    from dpkd.teacher_cache.config import CacheConfig

    out = tmp_path_factory.mktemp("caches") / "toy"
    options = {
        "teacher": str(toy_teacher),
        "out": out,
        "engine": "transformers",
        "template": "chat",
        "max_new_tokens": 12,
        "top_k": 16,
        "rows_per_shard": 6,
    }
    build_cache(CacheConfig(**options, data=str(toy_data), responses="both"))
    build_cache(CacheConfig(**options, student=str(toy_student), round="r0"))
    return out


@pytest.fixture
def cache_copy(tmp_path: Path, toy_cache: Path) -> Path:
    """A copy of the toy cache that a test may damage."""
    import shutil

    return Path(shutil.copytree(toy_cache, tmp_path / "cache"))
