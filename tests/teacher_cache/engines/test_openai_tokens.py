"""Tokens as bytes: what an endpoint writes, the tokenizer's id for it, and the text that they make together."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpkd.core.errors import UserError
from dpkd.teacher_cache.engines.openai.tokens import TokenTable

TEXT = "The 3 quick foxes' price:\n\t$4.50 (déjà vu, мир, 你好)! 🦊🧪  print(x)"


@pytest.fixture(scope="module")
def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: pieces with `▁` for a space, and a token for every byte."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁The", "The", "▁price", "\n"]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("name", ["toy_tokenizer", "teacher_dir"])
def test_the_bytes_of_a_text_lead_back_to_its_ids(name: str, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(name)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    table = TokenTable(tokenizer)
    assert table.is_exact
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert table.text(ids) == TEXT
    # as chat endpoints write tokens: the bytes, and beside them a text that cannot show all of them
    parts = [bytes(table._bytes[token]) for token in ids]
    assert b"".join(parts) == TEXT.encode()
    assert any(REPLACED in part.decode("utf-8", "replace") for part in parts), "no character is split: nothing is shown"
    assert [table.find(part.decode("utf-8", "replace"), list(part)) for part in parts] == ids
    # as completions write them
    written = [
        part.decode() if REPLACED not in part.decode("utf-8", "replace")
        else "bytes:" + "".join(f"\\x{byte:02x}" for byte in part)
        for part in parts
    ]  # fmt: skip
    assert [table.find(text) for text in written] == ids
    # the EOS by its text, or by its id
    eos = tokenizer.eos_token_id
    assert table.find(tokenizer.eos_token) == table.find(f"token_id:{eos}") == eos
    assert table.text([*ids, eos]) == TEXT


REPLACED = "�"


def test_what_no_token_is_has_no_id(toy_tokenizer: Path) -> None:
    table = TokenTable(AutoTokenizer.from_pretrained(toy_tokenizer))
    for text in ("no such token at all", REPLACED, "token_id:600", "", "bytes:\\x"):
        assert table.find(text) is None, text
    assert table.find(REPLACED, [0xE2]) is not None
    assert table.find("a", [300]) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 599), max_size=20))
def test_the_text_is_that_of_the_tokenizer(tokens_of_a_toy: object, ids: list[int]) -> None:
    tokenizer, table = tokens_of_a_toy  # type: ignore[misc]
    assert table.text(ids) == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def tokens_of_a_toy(toy_tokenizer: Path) -> object:
    tokenizer = AutoTokenizer.from_pretrained(toy_tokenizer)
    return tokenizer, TokenTable(tokenizer)


def test_a_text_does_not_say_which_token_of_byte_fallback_it_is(byte_fallback: PreTrainedTokenizerFast) -> None:
    table = TokenTable(byte_fallback)
    assert not table.is_exact
    ids = byte_fallback.convert_tokens_to_ids(["▁The", "▁price", "<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>", "</s>"])
    assert table.text(ids) == " The price🦊"
    assert [table.find(f"token_id:{token}") for token in ids] == ids
    assert table.find("\n") is None  # two tokens are written so


def test_a_tokenizer_without_bytes_is_refused() -> None:
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    with pytest.raises(UserError, match=r"have no bytes of their own.*Give --top-k 0 to cache texts alone"):
        TokenTable(wrapped)
