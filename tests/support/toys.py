"""Toy models with a real byte-level BPE tokenizer, trained on the excerpt of Dolly that the project ships."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
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
